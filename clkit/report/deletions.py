"""What a page says of deletion requests: the certificate, before and after, attacks, and the way through the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clkit.report.figures import MUTED, SERIES, Drawing, axis, legend_below, plain, shortened, styles
from clkit.unlearning.ledger import CERTIFICATE, FILE, Ledger, find_folder

_SIDES = {"forgotten": "forgotten", "retained": "retained", "never_seen": "never seen"}
Pairs = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Deletion:
    """A certificate in which a run stands, and the way of its job through the ledger.

    Attributes:
        role: ``new_run`` or ``superseded``.
        content: the certificate.
        history: states with reason and time (seconds since 1970).
        path: of the certificate.
    """

    role: str
    content: dict[str, Any]
    history: list[tuple[str, str | None, float]]
    path: Path

    @property
    def checks(self) -> list[tuple[str, bool, dict[str, Any]]]:
        """Name, outcome and the figures that are read as text; curves and scores are drawn."""
        return [(c["name"], c["passed"], _read(c["figures"])) for c in self.content["verification"]]

    @property
    def reasons(self) -> bool:
        """Whether the ledger gives a reason for any state."""
        return any(reason for _, reason, _ in self.history)

    def drawings(self, name: str) -> list[Drawing]:
        """What the figures of its checks allow; those of certificates before a figure was written are left out."""
        figures = {check["name"]: check["figures"] for check in self.content["verification"]}
        name = f"{name}-deletion-{self.content['job'][:8]}"
        found = []
        known = figures.get("membership", {}).get("probability", {})
        if known:
            sides = {label: tuple(known[side]) for side, label in _SIDES.items() if side in known}
            found.append(
                Drawing(
                    f"{name}-probability",
                    "Probability of the true answer",
                    "Before (ring) and after (dot) the deletion, mean over records. Forgotten records should end near "
                    "the never-seen ones, retained ones stay where they were.",
                    partial(_pairs, pairs=sides, label="probability of a token", of="records"),
                )
            )
        scores = {task: tuple(pair) for task, pair in figures.get("utility", {}).get("scores", {}).items()}
        if scores:
            found.append(
                Drawing(
                    f"{name}-utility",
                    "Utility: final score of each task",
                    "Before (ring) and after (dot) the deletion.",
                    partial(_pairs, pairs=scores, label="score", of="task"),
                    (340, max(190, 110 + 34 * len(scores))),
                )
            )
        attacks = {k: v for k, v in figures.get("membership", {}).items() if isinstance(v, dict) and "roc" in v}
        if attacks:
            sizes = figures["membership"].get("n")
            over = f", over {sizes[0]} forgotten and {sizes[1]} never-seen records" if sizes else ""
            found.append(
                Drawing(
                    f"{name}-roc",
                    "Membership inference after the deletion",
                    "Each attack's share of forgotten records found, against never-seen ones accused"
                    f"{over}. On the diagonal it can't tell them apart; below it "
                    "forgotten records look less learned than never-seen ones.",
                    partial(_roc, attacks=attacks),
                    (340, 290),
                )
            )
        if len(self.history) > 1:
            found.append(
                Drawing(
                    f"{name}-ledger",
                    "Way through the ledger",
                    "When the job came into each state.",
                    partial(_timeline, history=self.history),
                )
            )
        return found


def deletions(run_dir: Path) -> list[Deletion]:
    """The certificates that name this run, as the new one or as the one that it takes the place of."""
    folder = find_folder(run_dir)
    if folder is None or not (folder / FILE).is_file():
        return []
    found, ledger = [], Ledger(folder)
    try:
        for file in sorted(folder.glob(f"*/{CERTIFICATE}")):
            content = json.loads(file.read_text(encoding="utf-8"))
            for role in ("new_run", "superseded"):
                if (file.parent / content[role]["path"]).resolve() == run_dir.resolve():
                    found.append(Deletion(role, content, ledger.history(content["job"]), file))
    finally:
        ledger.close()
    return found


def _read(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as short texts."""
    shown: dict[str, Any] = {}
    for key, value in figures.items():
        if key in ("scores", "probability", "seed", "confidence"):  # drawn, or of use to nobody who reads
            continue
        key = "records (forgotten / never seen)" if key == "n" else key
        if isinstance(value, dict):
            parts = {k: v for k, v in value.items() if k != "roc"}
            shown[key] = ", ".join(f"{k} {_text(v)}" for k, v in parts.items())
        else:
            shown[key] = _text(value)
    return shown


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, float) for v in value):
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " / ".join(map(_text, value)) or "none" if isinstance(value, list) else str(value)


def _pairs(axes: Any, pairs: Pairs, label: str, of: str) -> None:
    """A line from before to after for each name."""
    for y, (before, after) in enumerate(pairs.values()):
        axes.plot([before, after], [y, y], color=MUTED, linewidth=1.2, zorder=1)
        axes.plot([before], [y], "o", color=SERIES[0], fillstyle="none", label="before" if y == 0 else None)
        axes.plot([after], [y], "o", color=SERIES[1], label="after" if y == 0 else None)
    names = [plain(name) for name in shortened(list(pairs))]
    shown = zip(names, pairs.values(), strict=True)
    axes.set_yticks(range(len(pairs)), [f"{name}\n{before:.3f} \u2192 {after:.3f}" for name, (before, after) in shown])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    if all(0 <= value <= 1 for pair in pairs.values() for value in pair):
        axes.set_xlim(-0.03, 1.03)
    axes.grid(axis="y", visible=False)
    axis(axes, label, of)
    legend_below(axes, 2)


def _roc(axes: Any, attacks: Mapping[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    for (name, found), style in zip(attacks.items(), styles(len(attacks)), strict=True):
        axes.plot(*found["roc"], label=f"{name} (AUC {found['auc'][0]:.2f})", **style)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axis(axes, "false positive rate", "true positive rate")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, handlelength=1.6)


def _timeline(axes: Any, history: list[tuple[str, str | None, float]]) -> None:
    states = list(dict.fromkeys(state for state, _, _ in history))
    seconds = [time - history[0][2] for _, _, time in history]
    rows = [states.index(state) for state, _, _ in history]
    axes.step(seconds, rows, where="post", color=MUTED, linewidth=1.2)
    axes.scatter(
        seconds, rows, s=28, color=[SERIES[1] if s == "failed" else SERIES[0] for s, _, _ in history], zorder=2
    )
    axes.set_yticks(range(len(states)), states)
    axes.set_ylim(len(states) - 0.5, -0.5)
    axis(axes, "seconds since the request was received", "state")
