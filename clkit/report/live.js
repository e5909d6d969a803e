"use strict";
// Fetch the page again when the run has gone on; what is open stays open.
let known = null;
async function text(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.text();
}
async function refresh() {
  let said = "live";
  try {
    const version = await text("version");
    if (known !== null && version !== known) {
      const fresh = new DOMParser().parseFromString(await text("./"), "text/html");
      const open = new Map([...document.querySelectorAll("details")].map(element => [element.firstElementChild.textContent, element.open]));
      for (const part of ["h1", "main"]) document.querySelector(part).replaceWith(fresh.querySelector(part));
      document.title = fresh.title;
      for (const element of document.querySelectorAll("details")) element.open = open.get(element.firstElementChild.textContent) ?? element.open;
    }
    known = version;
  } catch (error) { said = error instanceof TypeError ? "the server has stopped; this is the last state" : error.message; }
  document.getElementById("live").textContent = said;
  setTimeout(refresh, 2000);
}
refresh();
