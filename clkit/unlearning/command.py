"""What ``clkit unlearn`` does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from clkit.errors import ConfigError, VerificationError
from clkit.unlearning import certificate, methods, signing, workflow
from clkit.unlearning.gates import Limits, standard


def unlearn(arguments: Any) -> None:
    """Serve, plan, verify or make a key, by the command line's arguments.

    Raises:
        ConfigError: arguments that do not go together.
        RequestError: the request, the run or its data.
        VerificationError: a gate, or a check of the certificate, failed.
    """
    if arguments.new_key is not None:
        print(f"Public key: {signing.new_key(arguments.new_key)}")
        return
    if arguments.verify is not None:
        _verify(arguments)
        return
    missing = [name for name, value in (("--run", arguments.run_dir), ("--request", arguments.request)) if not value]
    if missing:
        raise ConfigError(f"clkit unlearn needs {' and '.join(missing)} (or --verify CERTIFICATE)")
    method = methods.make(arguments.method, arguments.set)
    if arguments.plan:
        print(workflow.plan(arguments.run_dir, arguments.request, method))
        return
    given = {f.name: getattr(arguments, f"max_{f.name}") for f in dataclasses.fields(Limits)}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    path = workflow.serve(
        arguments.run_dir,
        arguments.request,
        method,
        gates=standard(limits),
        decision=arguments.decision,
        purge=arguments.purge,
        sign_with=arguments.sign_with,
    )
    if path is not None:
        print(f"Certificate: {path}")


def _verify(arguments: Any) -> None:
    if arguments.run_dir or arguments.request:
        raise ConfigError("--verify checks a certificate and nothing else; leave out --run and --request")
    found = certificate.verify(arguments.verify, arguments.signed_by)
    for finding in found:
        print(f"{'ok    ' if finding.passed else 'FAILED'} {finding.name} {json.dumps(finding.figures or {})}")
    if not all(finding.passed for finding in found):
        raise VerificationError(f"{arguments.verify}: does not hold any more")
