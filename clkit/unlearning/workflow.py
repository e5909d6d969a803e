"""Serving a batch of deletion requests, from the file to the certificate; killed anywhere, the same call goes on.

received -> validated -> selected -> trained -> verified -> certified, each written into the ledger when it is reached.
From ``selected`` on the records are forgotten for every later run, also when training or a gate fails after that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clkit import build, resolve
from clkit.config import RunConfig
from clkit.errors import ClkitError, RequestError, VerificationError
from clkit.files import disk_errors, file_sha256, write_json
from clkit.rundir import fixed
from clkit.unlearning import certificate, remains, signing
from clkit.unlearning.case import Case, Source, open_source
from clkit.unlearning.duplicates import Pair, near_duplicates
from clkit.unlearning.gates import Evidence, Gate, Limits, brief, partition, run_gates, standard
from clkit.unlearning.ledger import CERTIFICATE, FOLDER, Ledger, find_folder
from clkit.unlearning.manifest import Manifest, keyed
from clkit.unlearning.methods import Method, plan_lines, why_not
from clkit.unlearning.records import Place, records, select, without
from clkit.unlearning.remains import Remains
from clkit.unlearning.request import DeletionRequest, read_requests
from clkit.unlearning.tombstones import Tombstones, in_force

Decision = Literal["include", "keep"]


@dataclass(frozen=True)
class Choice:
    """What a batch takes out: the records asked for, and retained ones that resemble them."""

    asked: set[Place]
    similar: list[Pair]


def choose(requests: Sequence[DeletionRequest], source: Source) -> Choice:
    """What the requests take out of the run's data.

    Raises:
        RequestError: with everything that is wrong with them on this data.
    """
    try:
        asked: set[Place] = set().union(*select(requests, source.known).values())
    except RequestError as error:
        if not source.facts.get("tombstones"):
            raise
        note = "\nRecords that earlier requests took out are no longer in this run's data."
        raise RequestError(f"{error}{note}", error.problems) from error
    # Tombstones hold by content too, so what says exactly the same goes with it.
    said = {r.content for r in source.known if r.place in asked}
    out = [r for r in source.known if r.content in said]
    asked = {r.place for r in out}
    _left(source, asked)
    return Choice(asked, near_duplicates(out, [r for r in source.known if r.place not in asked]))


def _left(source: Source, out: set[Place]) -> set[Place]:
    """Where the records stand that are out with these, and with those that are out already.

    Raises:
        RequestError: nothing is left to train on.
    """
    gone = out | in_force(source.path).places(source.tasks)
    if gone >= {r.place for r in source.known if r.place.part == "train"}:
        raise RequestError(
            "with all that say the same, and those forgotten already, every training record is out; delete the run "
            "instead"
        )
    return gone


def plan(run_dir: Path, request_file: Path, method: Method) -> str:
    """What serving a request would do and cost; nothing is written."""
    requests = read_requests(request_file)
    source = open_source(run_dir)
    choice = choose(requests, source)
    gone = _left(source, choice.asked)
    case = Case(source, frozenset(gone), without(source.tasks, gone))
    before = sum(build.stage_steps(source.config, source.tasks))
    lines = [
        f"{len(requests)} request(s) take out {len(choice.asked)} of {len(source.known)} records "
        f"({sum(p.part == 'train' for p in choice.asked)} of them trained on)",
        f"near-duplicates among the rest: {len(choice.similar)}",
    ]
    lines.append(f"the run took {before} optimiser steps; methods:")
    return "\n".join(lines + plan_lines(case, method))


def serve(
    run_dir: Path,
    request_file: Path,
    method: Method,
    *,
    gates: Sequence[Gate] | None = None,
    decision: Decision | None = None,
    purge: bool = False,
    sign_with: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path | None:
    """Serve the requests of a file as one batch.

    Args:
        run_dir: the finished run that learned the records.
        request_file: JSON or JSON Lines.
        method: how the model is trained without them.
        gates: what must hold; by default the standard ones, with their standard limits.
        decision: what to do with near-duplicates: take them along, or keep them.
        purge: delete the superseded run's checkpoints, export, samples and report after the certificate is written.
        sign_with: a private key file; the certificate is signed with it.
        say: shows where it is; gets counts and paths only.

    Returns:
        The certificate; that of an earlier call when the same requests were served on the same run. None of a dry run.

    Raises:
        RequestError: the file, the data or a decision; nothing was trained.
        VerificationError: a gate failed; there is no certificate, and the old run is as it was.
    """
    key = None if sign_with is None else signing.load_key(sign_with)
    requests = read_requests(request_file)
    source = open_source(run_dir)
    if requests[0].dry_run:
        say(plan(run_dir, request_file, method) + "\ndry run: nothing was done")
        return None
    ledger = Ledger(find_folder(source.path) or source.path.absolute().parent / FOLDER)
    try:
        with ledger.serving():
            job = _Job(ledger, source, requests, method, say)
            path = job.serve([partition, *(standard(Limits()) if gates is None else gates)], decision)
            if key is not None:
                certificate.sign(path, key)
            if purge:
                remains.purge(job.left_behind(), say)
            return path
    finally:
        ledger.close()


class _Job:
    """One batch on its way through the states."""

    def __init__(
        self,
        ledger: Ledger,
        source: Source,
        requests: Sequence[DeletionRequest],
        method: Method,
        say: Callable[[str], None],
    ) -> None:
        self.ledger, self.source, self.requests, self.method, self.say = ledger, source, requests, method, say
        self.key = keyed(
            ledger.key,
            *sorted(request.digest for request in requests),
            json.dumps(source.facts["data"], sort_keys=True),
            json.dumps(source.facts.get("model", {}), sort_keys=True),
            json.dumps(fixed(resolve.to_dict(source.config)), sort_keys=True),
            method.name,
            json.dumps(dataclasses.asdict(method.config), sort_keys=True),
        )
        self.folder = ledger.folder / self.key[:16]

    @property
    def state(self) -> str:
        found = self.ledger.state(self.key)
        return found[0] if found else ""

    @property
    def detail(self) -> dict[str, Any]:
        found = self.ledger.state(self.key)
        return found[2] if found else {}

    def serve(self, gates: Sequence[Gate], decision: Decision | None) -> Path:
        if self.state == "certified":
            self.say("already served; here is its certificate")
            return self.folder / CERTIFICATE
        self._refuse_served()
        self.ledger.receive(self.key, [(r.request_id, r.digest) for r in self.requests])
        try:
            if self.state == "received":
                build.check(self.source.config, self.source.tasks, _capabilities(self.source.config))
                self.ledger.advance(self.key, "validated")
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            if self.state == "validated":
                self._select(decision)
            case, manifest = self._partition()
            root = manifest.summary()["retained"]["merkle_root"]
            if self.state in ("trained", "verified") and self.detail.get("retained", root) != root:
                self.say("other requests were served since it was trained, so it is trained again")
                self.ledger.fail(self.key, "other records were forgotten since it was trained")
                return self.serve(gates, decision)
            if self.state == "selected":
                self.say(f"training without {len(manifest.forgotten)} of {len(manifest.full)} records")
                new_run = self.method.run(case, self._target(manifest))
                self.ledger.advance(self.key, "trained", run=str(new_run), retained=root)
            new_run = Path(self.detail["run"])
            findings = run_gates(gates, Evidence(self.source.path, new_run, case, manifest, self.method.sees_forgotten))
            failed = [f"{f.name} {brief(f.figures)}" for f in findings if not f.passed]
            if failed:
                raise VerificationError(
                    f"no certificate: {'; '.join(failed)}. The old run is as it was; the new one is in {new_run}."
                )
            if self.state == "trained":
                self.ledger.advance(self.key, "verified")
            return self._certify(case, manifest, new_run, findings)
        except RequestError as error:
            self.ledger.fail(self.key, f"request: {len(error.problems) or 1} problem(s)")
            raise
        except VerificationError as error:
            self.ledger.fail(self.key, f"{error}")
            raise
        except ClkitError as error:
            self.ledger.fail(self.key, type(error).__name__)
            raise

    def left_behind(self) -> Remains:
        """What of the old run, or made before the records were forgotten, is still on disk."""
        known = self.source.known
        stones = in_force(self.source.path)
        gone = {record.place for record in known if stones.covers(record)}
        return remains.find(self.source, gone, Path(self.detail["run"]), self.ledger)

    def _refuse_served(self) -> None:
        lines = []
        for request in self.requests:
            found = self.ledger.served(request.request_id, self.key)
            if found is None:
                continue
            job, digest = found
            how = "in another file, by another method or on another run"
            how = how if digest == request.digest else "with other content"
            state, *_ = self.ledger.state(job) or ("",)
            if state == "certified":
                path = self.ledger.folder / job[:16] / CERTIFICATE
                lines.append(f"{request.where}: already served, {how}; its certificate is {path}")
            else:
                lines.append(
                    f"{request.where}: begun already, {how}, and not finished; finish it with the same command"
                )
        if lines:
            raise RequestError("\n".join([*lines, "Give a new request its own request_id."]))

    def _select(self, decision: Decision | None) -> None:
        choice = choose(self.requests, self.source)
        out = {*choice.asked}
        if choice.similar:
            review = self.folder / "near_duplicates.json"
            rows = [
                {"retained": [*p.retained.place, p.retained.id], "forgotten": p.forgotten.id, "overlap": p.overlap}
                for p in choice.similar
            ]
            write_json(review, rows)
            if decision is None:
                raise RequestError(
                    f"{len(rows)} retained records say nearly what a forgotten one says; they are listed in {review}. "
                    "Run again with --include-near-duplicates or --keep-near-duplicates."
                )
            if decision == "include":
                said = {p.retained.content for p in choice.similar}
                out |= {r.place for r in self.source.known if r.content in said}
        hashes = Tombstones(self.ledger.key)
        stones = [hashes.hashes(r) for r in self.source.known if r.place in out]
        gone = _left(self.source, out)
        case = Case(self.source, frozenset(gone), without(self.source.tasks, gone))
        if problems := why_not(self.method, case):  # before anything is written
            raise RequestError.collect(f"--method {self.method.name} can't serve this request:", problems)
        self.method.admit(case)
        verdict = {"include": "taken along", "keep": "kept"}.get(decision or "", "none to decide on")
        near = {"found": len(choice.similar), "decision": verdict if choice.similar else "none to decide on"}
        self.ledger.advance(self.key, "selected", stones, near_duplicates=near)

    def _partition(self) -> tuple[Case, Manifest]:
        """What goes and what stays, and the proof; earlier requests' records are out too."""
        gone = in_force(self.source.path).places(self.source.tasks)
        retained = without(self.source.tasks, gone)
        left = list(records(retained))
        kept_names = {t.name for t in (*retained, *retained.holdout)}
        # A task that lost all its training records is gone with its evaluation records.
        gone |= {r.place for r in self.source.known if r.place.task not in kept_names}
        manifest = Manifest.of(self.source.known, left, gone, self.ledger.key)
        write_json(self.folder / "manifest.json", manifest.to_json())
        return Case(self.source, frozenset(gone), retained), manifest

    def _target(self, manifest: Manifest) -> Path:
        """A directory that is this data's own: beside the run, named by the retained records' root."""
        root = manifest.summary()["retained"]["merkle_root"]
        options = json.dumps(dataclasses.asdict(self.method.config), sort_keys=True)
        mark = hashlib.sha256(f"{root}{self.method.name}{options}".encode()).hexdigest()[:8]
        return self.source.path.absolute().parent / f"{self.source.path.absolute().name}-without-{mark}"

    def _certify(self, case: Case, manifest: Manifest, new_run: Path, findings: Sequence[Any]) -> Path:
        method = {
            "name": self.method.name,
            "what": self.method.what,
            "options": dataclasses.asdict(self.method.config),
            "guarantee": self.method.guarantee(case),
        }
        keys = ("request_id", "digest", "received_at", "legal_basis", "unit", "deadline")
        path = certificate.write(
            self.folder,
            job=self.key,
            requests=[{key: getattr(r, key) for key in keys} for r in self.requests],
            method=method,
            manifest=manifest,
            near_duplicates=self.detail["near_duplicates"],
            runs={"superseded": self.source.path, "new": new_run},
            left=remains.summary(self.left_behind(), self.source.path),
            findings=findings,
            versions=self.source.facts.get("versions", {}),
            guarantee=self.method.figures(case),
        )
        digest = json.loads(path.read_text(encoding="utf-8"))["digest"]
        page = file_sha256(self.folder / certificate.PAGE)
        self.ledger.advance(self.key, "certified", digest=digest, page_sha256=page)
        return path


def _capabilities(config: RunConfig) -> Any:
    from clkit.registry import STRATEGIES

    return STRATEGIES.get(config.strategy.name).capabilities
