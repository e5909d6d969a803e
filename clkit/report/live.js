"use strict";
// Fetch the page again when the run has gone on; what is open stays open.
let known = null;
async function refresh() {
  try {
    const version = await (await fetch("version")).text();
    if (known !== null && version !== known) {
      const fresh = new DOMParser().parseFromString(await (await fetch("./")).text(), "text/html");
      const open = [...document.querySelectorAll("details")].map(element => element.open);
      for (const part of ["h1", "main"]) document.querySelector(part).replaceWith(fresh.querySelector(part));
      document.title = fresh.title;
      document.querySelectorAll("details").forEach((element, i) => { if (i in open) element.open = open[i]; });
    }
    known = version;
    document.getElementById("live").textContent = "live";
  } catch { document.getElementById("live").textContent = "the server has stopped; this is the last state"; }
  setTimeout(refresh, 2000);
}
refresh();
