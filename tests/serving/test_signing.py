"""Who made a package is known before anything of it is loaded."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import SCHEMA
from tests.launch import launch
from tests.pages import blocks
from tests.serving.server.test_server import serving, unlabelled
from tests.serving.test_delta import files_of, write_package
from tests.serving.test_scorer import make_model
from torchrec_amort import InputError, RequestSchema, export_package, load_package
from torchrec_amort.apps import apply
from torchrec_amort.jobs.serve import _of_package, serve_until_told
from torchrec_amort.serving.delta import apply_delta, write_delta
from torchrec_amort.serving.package import (
    DELTA_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    TABLES_FILE,
    checksum,
    read_manifest,
    signer,
    write_manifest,
)
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.server.watch import Watch
from torchrec_amort.serving.signing import read_signing_key, read_trusted_keys
from torchrec_amort.serving.versions import Versions

MAKE_KEY, SIGN, ROTATE = blocks("docs/deploying.md", "sh")


def openssl(folder: Path, commands: str) -> None:
    subprocess.run(["bash", "-ec", commands], cwd=folder, check=True, capture_output=True, timeout=60)


def make_key(folder: Path) -> None:
    """Make a key as the page says."""
    openssl(folder, MAKE_KEY)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two keys."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        (folder / name).mkdir()
        make_key(folder / name)
    return folder


def small(folder: Path, code: bytes = b"code") -> Path:
    return write_package(folder, {"film": torch.arange(12, dtype=torch.uint8).reshape(4, 3)}, code)


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def loaded(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has loaded anything of a package, in its order."""
    loaded: list[str] = []

    def record(owner: Any, name: str) -> None:
        load = getattr(owner, name)

        def recorded(*args: Any, **options: Any) -> Any:
            loaded.append(name)
            return load(*args, **options)

        monkeypatch.setattr(owner, name, recorded)

    record(torch, "load")
    record(torch._inductor, "aoti_load_package")
    record(RequestSchema, "load")
    return loaded


def test_only_signed_packages_are_loaded_and_the_version_that_answers_goes_on(
    keys: Path, tmp_path: Path, loaded: list[str]
) -> None:
    monday, tuesday = tmp_path / "monday", tmp_path / "tuesday"
    signing_key, trusted_key = keys / "own" / "signing.pem", str(keys / "own" / "trusted.pem")
    export_package(make_model(0), monday, SCHEMA, signing_key=signing_key)
    export_package(make_model(1), tuesday, SCHEMA, signing_key=signing_key)

    def exchange_code(package: Path) -> None:
        """As one does who can write packages, and has no key."""
        shutil.copy(monday / "candidates.pt2", package)
        write_manifest(package, read_manifest(tuesday))

    spoilt: dict[str, tuple[Callable[[Path], Any], str]] = {
        "unsigned": (lambda p: (p / SIGNATURE_FILE).unlink(), "the package is not signed, and a key of"),
        "by another key": (signer(keys / "other" / "signing.pem"), "none of the 1 keys of"),
        "another signature": (lambda p: shutil.copy(monday / SIGNATURE_FILE, p), "none of the 1 keys of"),
        "half a signature": (lambda p: os.truncate(p / SIGNATURE_FILE, 32), "none of the 1 keys of"),
        "another manifest": (lambda p: change_a_byte(p / MANIFEST_FILE), "none of the 1 keys of"),
        "other code": (exchange_code, "none of the 1 keys of"),
        "other tables": (lambda p: change_a_byte(p / TABLES_FILE), f"{TABLES_FILE}: checksum is"),
        "more files": (
            lambda p: shutil.copy(p / "samples.parquet", p / "vocabulary-user_id.parquet"),
            "vocabulary-user_id.parquet: is not in manifest.json, so that nobody has signed it",
        ),
    }
    load = partial(_of_package, ServeConfig(package=str(monday), trusted_key=trusted_key), mapped=None)
    with serving(Versions(load(str(monday))), load=load) as client:

        def scores() -> tuple[str, np.ndarray]:
            answer = client.http.post("/v1/score", json={"requests": unlabelled()}).json()
            return answer["version"], np.concatenate(answer["scores"])

        _, of_monday = scores()
        assert set(loaded) == {"load", "aoti_load_package"}
        for name, (spoil, told) in spoilt.items():
            package = tmp_path / name
            shutil.copytree(tuesday, package)
            spoil(package)
            loaded.clear()
            reply = client.http.post("/v1/versions", json={"folder": str(package)})
            assert reply.status_code == 400 and told in reply.json()["error"], reply.text
            with pytest.raises(InputError, match=told):
                serve_until_told(ServeConfig(package=str(package), trusted_key=trusted_key, processes=1))
            assert loaded == []
            version, found = scores()
            assert version == "monday"
            np.testing.assert_array_equal(found, of_monday)
        # Its code would run if nobody asked who made it.
        with pytest.raises(InputError, match="a probability differs"):
            load_package(tmp_path / "other code")
        assert "aoti_load_package" in loaded

        watched = tmp_path / "watched"
        watch = Watch(watched, monday, client.server._endpoint.switch)
        shutil.copytree(tmp_path / "unsigned", watched / "wednesday")
        os.utime(watched / "wednesday" / MANIFEST_FILE, (2**32, 2**32))
        watch.look()
        assert scores()[0] == "monday"
        shutil.copytree(tuesday, watched / "thursday")
        os.utime(watched / "thursday" / MANIFEST_FILE, (2**32 + 1, 2**32 + 1))
        watch.look()
        version, found = scores()
        assert version == "thursday" and not np.allclose(found, of_monday)
        assert client.http.post("/v1/versions", json={"folder": str(tuesday)}).json() == {"version": "tuesday"}


def test_no_process_of_several_starts_with_an_unsigned_package(keys: Path, tmp_path: Path) -> None:
    package, trusted_key = str(small(tmp_path / "package")), str(keys / "own" / "trusted.pem")
    command = ("torchrec-amort", "serve", "--package", package, "--trusted_key", trusted_key)
    done = launch(*command, "--processes", "2", "--grpc_port", "8011", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {package}/{SIGNATURE_FILE}: no such file: the package is not signed")


def test_keys_are_rotated_and_openssl_signs_what_is_exported(keys: Path, tmp_path: Path) -> None:
    package = small(tmp_path / "package")
    shutil.copytree(keys / "own", tmp_path / "old")
    shutil.copytree(keys / "other", tmp_path / "new")
    openssl(tmp_path, SIGN.replace("signing.pem", "old/signing.pem").replace("packages/first", "package"))
    openssl(tmp_path, ROTATE)
    both = tmp_path / "trusted.pem"
    read_manifest(package, both)
    with pytest.raises(InputError, match=r"manifest.sig: none of the 1 keys of .*new/trusted.pem has signed"):
        read_manifest(package, tmp_path / "new" / "trusted.pem")
    signer(tmp_path / "new" / "signing.pem")(package)
    for trusted_key in (both, tmp_path / "new" / "trusted.pem"):
        read_manifest(package, trusted_key)
    verify = "openssl pkeyutl -verify -pubin -inkey new/trusted.pem -rawin -in package/manifest.json"
    openssl(tmp_path, f"{verify} -sigfile package/{SIGNATURE_FILE}")


def test_a_signed_delta_makes_a_signed_package(keys: Path, tmp_path: Path) -> None:
    base, package = small(tmp_path / "base"), small(tmp_path / "package", b"new code")
    signer(keys / "own" / "signing.pem")(package)
    write_delta(package, base, tmp_path / "delta")
    apply_delta(tmp_path / "delta", base, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(package)
    read_manifest(tmp_path / "again", keys / "own" / "trusted.pem")
    options = {"delta": "delta", "base": "base", "out": "signed"}
    apply.main(
        [
            *(f"--{name}={tmp_path / folder}" for name, folder in options.items()),
            f"--signing_key={keys / 'other' / 'signing.pem'}",
        ]
    )
    read_manifest(tmp_path / "signed", keys / "other" / "trusted.pem")
    with pytest.raises(InputError, match="has signed this manifest.json"):
        read_manifest(tmp_path / "signed", keys / "own" / "trusted.pem")


@pytest.mark.usefixtures("uncompiled")
def test_only_signed_deltas_are_taken_as_they_are(keys: Path, tmp_path: Path, loaded: list[str]) -> None:
    signing_key, trusted_key = keys / "own" / "signing.pem", str(keys / "own" / "trusted.pem")
    monday, tuesday = tmp_path / "monday", tmp_path / "package"
    export_package(make_model(0), monday, SCHEMA, signing_key=signing_key)
    export_package(make_model(1), tuesday, SCHEMA, signing_key=signing_key)
    write_delta(tuesday, monday, tmp_path / "tuesday", signing_key=signing_key)

    def exchange_rows(delta: Path) -> None:
        """As one does who can write deltas, and has no key."""
        torch.save({}, delta / "rows.pt")
        record = json.loads((delta / DELTA_FILE).read_text())
        record["sha256"]["rows.pt"] = checksum(delta / "rows.pt")
        (delta / DELTA_FILE).write_text(json.dumps(record))

    spoilt: dict[str, tuple[Callable[[Path], Any], str]] = {
        # Its package is signed, which has other rows' checksum.
        "unsigned": (lambda d: (d / "delta.sig").unlink(), "delta.sig: no such file: the delta is not signed"),
        "by another key": (signer(keys / "other" / "signing.pem", DELTA_FILE), "none of the 1 keys of"),
        "other rows": (exchange_rows, "has signed this delta.json"),
        "damaged rows": (lambda d: change_a_byte(d / "rows.pt"), "rows.pt: checksum is"),
        "more files": (
            lambda d: shutil.copy(d / "samples.parquet", d / "vocabulary-user_id.parquet"),
            "vocabulary-user_id.parquet: is not in delta.json, so that nobody has signed it",
        ),
    }
    load = partial(_of_package, ServeConfig(package=str(monday), trusted_key=trusted_key), mapped=None)
    versions = Versions(load(str(monday)))
    with serving(versions, load=lambda folder: load(folder, current=versions.current)) as client:
        for name, (spoil, told) in spoilt.items():
            spoil(Path(shutil.copytree(tmp_path / "tuesday", tmp_path / name)))
            loaded.clear()
            reply = client.http.post("/v1/versions", json={"folder": str(tmp_path / name)})
            assert reply.status_code == 400 and told in reply.json()["error"], reply.text
            assert loaded == [] and versions.current.name == "monday"
        reply = client.http.post("/v1/versions", json={"folder": str(tmp_path / "tuesday")})
        assert reply.json() == {"version": "tuesday"}
    openssl(tmp_path, SIGN.replace("signing.pem", str(keys / "other" / "signing.pem")).replace("manifest", "delta")
            .replace("packages/first", "unsigned"))  # fmt: skip
    with pytest.raises(InputError, match="has signed this delta.json"):
        load(str(tmp_path / "unsigned"))
    load = partial(
        _of_package, ServeConfig(package=str(monday), trusted_key=str(keys / "other" / "trusted.pem")), mapped=None
    )
    with pytest.raises(InputError, match="and none answers yet"):
        load(str(tmp_path / "unsigned"))


OF_RSA = "openssl genpkey -algorithm rsa -out rsa.pem; openssl pkey -in rsa.pem -pubout -out file.pem"


@pytest.mark.parametrize(
    ("read", "make", "told"),
    [
        (read_signing_key, "true", "signing_key: .*file.pem: not a PEM file of a private key .*No such file"),
        (read_signing_key, "cp trusted.pem file.pem", "signing_key: .*file.pem: not a PEM file of a private key"),
        (read_signing_key, f"{OF_RSA}; mv rsa.pem file.pem", "signing_key: .*: is of another algorithm .RSAPrivateKey"),
        (read_signing_key, "openssl pkey -in signing.pem -aes256 -passout pass:secret -out file.pem",
         "without passphrase .Password was not given"),
        (read_trusted_keys, "true", "trusted_key: .*file.pem: not a PEM file of public keys alone .*No such file"),
        (read_trusted_keys, "echo > file.pem", "public keys have to be of Ed25519, one at least, .*: none"),
        (read_trusted_keys, "cat trusted.pem signing.pem > file.pem", "not a PEM file of public keys alone"),
        (read_trusted_keys, "(cat trusted.pem; head -2 trusted.pem) > file.pem", "not a PEM file of public keys alone"),
        (read_trusted_keys, f"{OF_RSA}; cat trusted.pem >> file.pem", "there are: RSAPublicKey, Ed25519PublicKey"),
    ],
)  # fmt: skip
def test_files_of_other_keys_are_refused(
    read: Callable[[Path], Any], make: str, told: str, keys: Path, tmp_path: Path
) -> None:
    shutil.copytree(keys / "own", tmp_path, dirs_exist_ok=True)
    openssl(tmp_path, make)
    with pytest.raises(InputError, match=told):
        read(tmp_path / "file.pem")


def test_a_run_is_not_served_where_packages_have_to_be_signed() -> None:
    with pytest.raises(InputError, match="trusted_key is 'trusted.pem', but a run_folder answers"):
        ServeConfig(run_folder="runs/first", trusted_key="trusted.pem")
