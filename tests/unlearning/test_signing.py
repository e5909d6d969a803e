"""Signed certificates: what a signature says, and what it does not survive."""

from __future__ import annotations

import json
import stat

import pytest
from people import request

from clkit.cli import main
from clkit.unlearning import signing

pytest.importorskip("cryptography")


def test_a_certificate_is_signed_and_every_change_of_it_is_found(digits_run, digit_ids, write, tmp_path, capsys):
    key, other = tmp_path / "key.pem", tmp_path / "other.pem"
    assert main(["unlearn", "--new-key", str(key)]) == 0
    public = capsys.readouterr().out.split()[-1]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    file = write(request({"record_ids": digit_ids[:2]}))
    argv = ["unlearn", "--run", str(digits_run), "--request", str(file), "--max-utility-loss", "1"]
    argv += ["--max-membership", "1", "--sign-with", str(key)]
    assert main(argv) == 0
    (path,) = (digits_run.parent / "unlearning").glob("*/certificate.json")
    content = json.loads(path.read_text())
    assert content["signature"]["public_key"] == public
    assert main(["unlearn", "--verify", str(path), "--signed-by", public]) == 0
    assert "ok     signature" in capsys.readouterr().out

    main(["unlearn", "--new-key", str(other)])
    stranger = capsys.readouterr().out.split()[-1]
    assert main(["unlearn", "--verify", str(path), "--signed-by", stranger]) == 3, "another key than the one expected"
    forged = {**content, "issued_at": "2020-01-01"}
    from clkit.unlearning.certificate import digest

    path.write_text(json.dumps({**forged, "digest": digest(forged)}))
    capsys.readouterr()
    assert main(["unlearn", "--verify", str(path)]) == 3
    out = capsys.readouterr().out
    assert "ok     digest" in out and "FAILED signature" in out
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "signature"}))
    assert main(["unlearn", "--verify", str(path), "--signed-by", public]) == 3, "a signature that was taken away"


def test_a_key_is_never_written_over_and_what_is_no_key_is_refused(tmp_path, digits_run, write, capsys):
    key = tmp_path / "key.pem"
    public = signing.new_key(key)
    before = key.read_bytes()
    assert main(["unlearn", "--new-key", str(key)]) == 2 and key.read_bytes() == before
    assert "never written over" in capsys.readouterr().err
    assert signing.sign(signing.load_key(key), "d")["public_key"] == public
    key.write_text("nothing")
    file = write(request({"record_ids": ["x"]}))
    argv = ["unlearn", "--run", str(digits_run), "--request", str(file), "--sign-with", str(key)]
    assert main(argv) == 2
    assert "can't be read as a private key" in capsys.readouterr().err


def test_what_is_no_signature_does_not_hold(tmp_path):
    key = signing.load_key(_made(tmp_path))
    good = signing.sign(key, "abc")
    assert signing.holds(good, "abc") and not signing.holds(good, "abd")
    for broken in ({}, None, {**good, "value": "zz"}, {**good, "public_key": "00"}, {**good, "algorithm": "RSA"}):
        assert not signing.holds(broken, "abc")


def _made(folder):
    signing.new_key(folder / "k.pem")
    return folder / "k.pem"
