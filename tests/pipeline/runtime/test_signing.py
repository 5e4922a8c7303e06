"""Bundles that only run where they are signed."""

import shutil

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from pipeline.cli import main
from pipeline.errors import BundleError
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.shelf import Shelf
from pipeline.runtime.signing import SIGNATURE, Signer


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Of each kind of key a private file and a public one."""
    folder, made = tmp_path_factory.mktemp("release"), {}
    for name, key in (
        ("ours", ed25519.Ed25519PrivateKey.generate()),
        ("theirs", ed25519.Ed25519PrivateKey.generate()),
        ("ec", ec.generate_private_key(ec.SECP256R1())),
    ):
        made[name] = (folder / f"{name}.key", folder / f"{name}.pem")
        made[name][0].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        made[name][1].write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return made


@pytest.fixture
def coinfer(monkeypatch, capsys):
    """coinfer(argument, ...) -> exit code, and what it said on both streams"""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["coinfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


def test_a_signed_bundle_is_taken_and_any_other_refused(make_bundle, release, coinfer, tmp_path):
    bundle, other = make_bundle(), make_bundle(seed=1)
    (key, public), (_, theirs) = release["ours"], release["theirs"]
    with pytest.raises(BundleError, match="sign the bundle with `coinfer bundle sign`"):
        Signer(public).check(bundle)
    assert coinfer("bundle", "sign", bundle.path, "--key", key) == (0, f"{bundle.path / SIGNATURE}\n", "")
    signed = Bundle.load(bundle.path)
    assert signed.manifest == bundle.manifest
    Signer(public).check(signed)
    with pytest.raises(BundleError, match="no signature of this bundle"):
        Signer(theirs).check(signed)
    shutil.copy(bundle.path / SIGNATURE, other.path)
    with pytest.raises(BundleError, match="no signature of this bundle"):
        Signer(public).check(other)


@pytest.mark.parametrize("text", ["", "not base64!", "AAAA", "\xff"])
def test_what_is_no_signature_is_refused(make_bundle, release, text):
    bundle = make_bundle()
    (bundle.path / SIGNATURE).write_text(text, "latin-1")
    with pytest.raises(BundleError, match="no signature of this bundle"):
        Signer(release["ours"][1]).check(bundle)


def test_an_edge_takes_no_unsigned_bundle_later_either(make_bundle, release, coinfer, tmp_path, capsys):
    old, new = make_bundle(), make_bundle(seed=1)
    key, public = release["ours"]
    coinfer("bundle", "sign", old.path, "--key", key)
    shelf = tmp_path / "shelf"
    shutil.copytree(old.path, shelf / "old")
    looking = Shelf(shelf, check=Signer(public).check)
    assert [half.bundle_id for half in looking.first()] == [old.bundle_id]
    shutil.copytree(new.path, shelf / "new")
    assert looking.look() == ([], {old.bundle_id})
    assert "coinfer bundle sign" in capsys.readouterr().err
    coinfer("bundle", "sign", shelf / "new", "--key", key)
    came, ids = looking.look()
    assert ([half.bundle_id for half in came], ids) == ([new.bundle_id], {old.bundle_id, new.bundle_id})


@pytest.mark.parametrize("command", ["edge", "device", "bundle triton"])
def test_the_commands_refuse_an_unsigned_bundle(make_bundle, release, coinfer, command, tmp_path):
    bundle, out = make_bundle(), tmp_path / "models"
    arguments = {"edge": ("--bundle", bundle.path, "--port", "0"), "device": ("--bundle", bundle.path, "--source", tmp_path)}
    code, said, err = coinfer(*command.split(), *arguments.get(command, (bundle.path, out)), "--signed-by", release["ours"][1])
    assert (code, said) == (1, "")
    assert "coinfer bundle sign" in err
    assert not out.exists()


@pytest.mark.parametrize("what", ["missing", "public", "ec", "garbage"])
def test_keys_that_cannot_sign_or_check_are_refused(make_bundle, release, coinfer, tmp_path, what):
    bundle = make_bundle()
    (tmp_path / "garbage").write_text("-----BEGIN")
    private, public = {
        "missing": (tmp_path / "none", tmp_path / "none"),
        "public": (release["ours"][1], release["ours"][0]),
        "ec": release["ec"],
        "garbage": (tmp_path / "garbage", tmp_path / "garbage"),
    }[what]
    for arguments in (("bundle", "sign", bundle.path, "--key", private), ("device", "--bundle", bundle.path, "--source", tmp_path, "--signed-by", public)):
        code, out, err = coinfer(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "Ed25519" in err
    assert not (bundle.path / SIGNATURE).exists()
