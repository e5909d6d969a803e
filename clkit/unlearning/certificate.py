"""The certificate: what was done for a batch of deletion requests, what follows from it, and how to check it again.

It names request ids, counts, hashes and figures, and no record. :func:`verify` checks again whatever is still there.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clkit.checkpoint import CheckpointStore
from clkit.checkpoint import digest as tensor_digest
from clkit.errors import CheckpointError, RequestError
from clkit.files import file_sha256, write_json, write_text
from clkit.unlearning import signing
from clkit.unlearning.gates import Finding, brief
from clkit.unlearning.ledger import CERTIFICATE, FILE, Ledger
from clkit.unlearning.manifest import Manifest

SCHEMA = 1
PAGE = "certificate.md"
NOT_CLAIMED = (
    "that the base model knew nothing of the forgotten records from its own pre-training",
    "anything about copies of the superseded model, its checkpoints, exports, logs or answers that left this run",
    "that no retained record mentions or paraphrases what was forgotten, beyond the near-duplicate search",
    "that the source files were deleted, or what is listed as still there",
    "that choices made with the forgotten records in view (hyper-parameters, tokeniser, class list) were made again",
    "resistance to attacks that are not among the checks, relearning among them",
)


def digest(certificate: dict[str, Any]) -> str:
    """SHA-256 over everything in a certificate but its own digest and the signature of that."""
    rest = {k: v for k, v in certificate.items() if k not in ("digest", "signature")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def run_files(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the files that say what a run is and what serves, by path within it."""
    fixed = [run_dir / name for name in ("config.yaml", "run.json", "matrix.json", "metrics.json")]
    exported = sorted(p for p in (run_dir / "export").rglob("*") if p.is_file())
    return {p.relative_to(run_dir).as_posix(): file_sha256(p) for p in (*fixed, *exported) if p.is_file()}


def checkpoint_files(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the manifest of each checkpoint, by its name; the manifest has the hashes of what is in it."""
    found = sorted((run_dir / "checkpoints").glob("[0-9]*/manifest.json"))
    return {path.parent.name: file_sha256(path) for path in found}


def write(
    folder: Path,
    *,
    job: str,
    requests: Sequence[dict[str, Any]],
    method: dict[str, Any],
    manifest: Manifest,
    near_duplicates: dict[str, Any],
    runs: dict[str, Path],
    findings: Sequence[Finding],
    versions: dict[str, Any],
    left: dict[str, Any],
    guarantee: dict[str, Any] | None = None,
) -> Path:
    """Write ``certificate.json`` and ``certificate.md`` into the job's folder; returns the former.

    Args:
        folder: the job's folder in the ledger's; ``manifest.json`` is there.
        job: the job's key.
        requests: id, digest, times, legal basis and unit of each request.
        method: name, what it does, and what its result is equal to or compared with.
        manifest: the partition.
        near_duplicates: how many were found, and what was decided.
        runs: ``superseded`` and ``new`` run directories.
        findings: of the gates.
        versions: of the packages.
        left: what is still on disk that knows the records (``remains.summary``).
        guarantee: figures of a differential-privacy guarantee; None where the method needs none.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "job": job,
        "issued_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "requests": list(requests),
        "method": method,
        "guarantee": guarantee,
        "records": manifest.summary(),
        "near_duplicates": near_duplicates,
        "verification": [{"name": f.name, "passed": f.passed, "figures": f.figures} for f in findings],
        "new_run": {"path": _relative(runs["new"], folder), **_new_run(runs["new"])},
        "superseded": {
            "path": _relative(runs["superseded"], folder),
            **left,
        },
        "manifest_sha256": file_sha256(folder / "manifest.json"),
        "versions": versions,
        "not_claimed": list(NOT_CLAIMED),
    }
    content["digest"] = digest(content)
    write_text(folder / PAGE, markdown(content))
    write_json(folder / CERTIFICATE, content)
    return folder / CERTIFICATE


def sign(path: Path, key: Any) -> None:
    """Put a signature of a certificate's digest into it; the digest stays the same."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["signature"] = signing.sign(key, content["digest"])
    write_json(path, content)


def _new_run(run_dir: Path) -> dict[str, Any]:
    return {"files": run_files(run_dir), "checkpoints": checkpoint_files(run_dir)}


def _relative(path: Path, folder: Path) -> str:
    """A path as seen from the job's folder, so that ledger and runs can be moved together."""
    up, here = [], folder.resolve()
    while not path.resolve().is_relative_to(here):
        here = here.parent
        up.append("..")
    return "/".join([*up, path.resolve().relative_to(here).as_posix()])


def markdown(content: dict[str, Any]) -> str:
    """The certificate to read."""
    counts = {name: part["count"] for name, part in content["records"].items()}
    left = [*content["superseded"]["still_there"], *content["superseded"]["cached_features"]]
    others = ", ".join(content["superseded"]["other_runs_begun_before"])
    lines = [
        f"# Deletion certificate {content['job'][:16]}",
        "",
        f"Issued {content['issued_at']}, SHA-256 `{content['digest']}`.",
        "",
        "Requests: " + ", ".join(f"`{r['request_id']}` ({r['legal_basis']})" for r in content["requests"]),
        "",
        f"Of {counts['full']} records, {counts['forgotten']} were taken out and {counts['retained']} kept "
        f"(counted in training and evaluation sets; forgotten by earlier requests included).",
        "",
        f"Method **{content['method']['name']}**: {content['method']['what']}. {content['method']['guarantee']}",
        *_figures(content["guarantee"]),
        "",
        f"Near-duplicates in the kept data: {content['near_duplicates']['found']}; "
        f"{content['near_duplicates']['decision']}.",
        "",
        "| check | passed | figures |",
        "|---|---|---|",
        *(
            f"| {f['name']} | {'yes' if f['passed'] else 'NO'} | {brief(f['figures'])} |"
            for f in content["verification"]
        ),
        "",
        f"Still on disk when this was issued: {', '.join(left) or 'nothing of the superseded run'}. Other runs that "
        f"began before the records were forgotten: {others or 'none'}.",
        "",
        "Not claimed:",
        "",
        *(f"- {line}" for line in [*content["not_claimed"], *(content["guarantee"] or {}).get("not_claimed", ())]),
        "",
    ]
    return "\n".join(lines)


def _figures(guarantee: dict[str, Any] | None) -> list[str]:
    """The figures of a guarantee as a table, and what it assumes."""
    if guarantee is None:
        return []
    rows = {k: v for k, v in guarantee.items() if k not in ("assumptions", "not_claimed", "rests_on", "compared_with")}
    table = [f"| {name.replace('_', ' ')} | {json.dumps(value)} |" for name, value in rows.items()]
    return ["", "| guarantee | |", "|---|---|", *table, "", "It assumes:", ""] + [
        f"- {line}" for line in guarantee.get("assumptions", ())
    ]


def verify(path: Path, signed_by: str | None = None) -> list[Finding]:
    """Check a certificate again: its hash and signature, the manifest and its roots, the new run's files, the ledger.

    A guarantee's epsilons are computed again, and the protected base's weights are hashed again if they are there.

    ``certificate.md`` is checked where it still lies beside the certificate.

    Args:
        path: the certificate.
        signed_by: the public key that must have signed it, hexadecimal; without one, a signature is only checked
            against the key that it names itself.

    Raises:
        RequestError: it is not a certificate that this clkit reads.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: can't be read as a certificate ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("job"), str):
        raise RequestError(f"{path}: is not a certificate of schema {SCHEMA}")
    folder = path.parent
    found = [Finding("digest", content.get("digest") == digest(content))]
    signature = content.get("signature")
    if signature is not None or signed_by is not None:
        key = signature.get("public_key") if isinstance(signature, dict) else None
        right = signing.holds(signature, digest(content)) and signed_by in (None, key)
        found.append(Finding("signature", right, {"public_key": key}))
    manifest_file = folder / "manifest.json"
    try:
        same = file_sha256(manifest_file) == content["manifest_sha256"]
        manifest = Manifest.from_json(json.loads(manifest_file.read_text(encoding="utf-8")))
        found.append(Finding("manifest", same and manifest.summary() == content["records"]))
        found.append(Finding("partition", not manifest.problems()))
        now = run_files(folder / content["new_run"]["path"])
        changed = sorted({*now.items()} ^ {*content["new_run"]["files"].items()})
        found.append(Finding("new_run_files", not changed, {"changed": sorted({name for name, _ in changed})}))
        if "checkpoints" in content["new_run"]:  # those that are still there; they may be deleted
            there = checkpoint_files(folder / content["new_run"]["path"]).items()
            others = sorted(name for name, _ in {*there} - {*content["new_run"]["checkpoints"].items()})
            found.append(Finding("new_run_checkpoints", not others, {"changed": others}))
        found += _rests_on(folder / content["superseded"]["path"], content["guarantee"])
        found += _epsilon(content["guarantee"])
        found.append(Finding("gates", all(f["passed"] is True for f in content["verification"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.append(Finding("readable", False, {"error": type(error).__name__}))
    listed = _in_ledger(folder.parent, content)
    found.append(Finding("ledger", listed is not None))
    page = (listed or {}).get("page_sha256")  # None: of an older clkit, which did not keep it
    if page is not None and (folder / PAGE).is_file():
        found.append(Finding("page", file_sha256(folder / PAGE) == page, {"file": PAGE}))
    return found


def _rests_on(superseded: Path, guarantee: dict[str, Any] | None) -> list[Finding]:
    """Whether the run that a guarantee rests on is what it was; its path is seen from the superseded run's."""
    rests_on = (guarantee or {}).get("rests_on")
    if rests_on is None:
        return []
    # By its parts: the way through the superseded run's directory ends where that was deleted.
    base = Path(os.path.normpath(superseded / rests_on["path"]))
    now, then = run_files(base), rests_on["files"]
    changed = sorted({name for name, _ in {*now.items()} ^ {*then.items()}})
    try:
        saved = CheckpointStore(base / "checkpoints").load()
        same = saved is None or tensor_digest(saved["model"]) == rests_on["weights"]
    except CheckpointError:
        same = False
    return [Finding("rests_on", same and not changed, {"changed": changed if same else ["checkpoints", *changed]})]


def _epsilon(guarantee: dict[str, Any] | None) -> list[Finding]:
    """Whether the epsilons of a guarantee, of one unit and of the group, follow from the steps that it counts."""
    if guarantee is None or "spent" not in guarantee:
        return []
    from clkit.engine.guarantee import statement

    steps = [[row[key] for key in ("noise_multiplier", "sampling_rate", "steps")] for row in guarantee["spent"]]
    again = statement({**guarantee, "spent": steps}, guarantee["group"]["units"])
    figures = [(again["epsilon"], guarantee["epsilon"])]
    for bound in ("tight", "naive"):
        ours, theirs = again["group"][bound] or {}, guarantee["group"][bound] or {}
        figures += [(ours.get(key), theirs.get(key)) for key in ("epsilon", "delta")]
    same = [a == b or (None not in (a, b) and math.isclose(a, b, rel_tol=1e-3)) for a, b in figures]
    return [Finding("epsilon", all(same))]


def _in_ledger(folder: Path, content: dict[str, Any]) -> dict[str, Any] | None:
    """What the ledger holds of the job; None where it does not know this certificate."""
    if not (folder / FILE).is_file():
        return None
    ledger = Ledger(folder)
    try:
        state = ledger.state(content["job"])
    finally:
        ledger.close()
    same = state is not None and state[0] == "certified" and state[2].get("digest") == content.get("digest")
    return state[2] if state is not None and same else None
