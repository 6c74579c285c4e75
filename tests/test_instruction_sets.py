"""Every native build this machine can run holds the same properties, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qupedkern.backends import module
from qupedkern.testing.__main__ import main
from qupedkern.testing.harness import kernels, missing_backends, running_backends

ISAS = ("baseline", "avx2", "avx512")
NATIVE = pytest.mark.skipif(
    "cpp" not in running_backends(), reason=f"cpp does not run here: {missing_backends().get('cpp')}"
)


@NATIVE
@pytest.mark.parametrize("isa", ISAS)
def test_every_kernel_of_an_instruction_set_is_within_its_bounds(isa: str) -> None:
    environment = {**os.environ, "QUPEDKERN_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qupedkern.testing", "--backend", "cpp", "--examples", "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "QUPEDKERN_ISA" in done.stderr:
        last = done.stderr.strip().splitlines()[-1]
        assert f"QUPEDKERN_ISA={isa}: this " in last, done.stderr
        pytest.skip(last)  # the sentence names what this machine runs or this install built
    count = sum(backend == "cpp" for _, backend in kernels())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"{count} of {count} kernels within their bounds on 12 examples each"


def test_a_wrong_name_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["round"]) == 2
    assert capsys.readouterr().err.startswith("qupedkern.testing: OP must be one of ")
    assert main(["--backend", "abacus"]) == 2
    assert capsys.readouterr().err.startswith("qupedkern.testing: --backend must be one of eager")
    assert main(["--examples", "0"]) == 2
    assert capsys.readouterr().err == "qupedkern.testing: --examples must be at least 1, got 0\n"


def test_a_kernel_that_forgets_its_last_element_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The harness must see a wrong kernel, or all the rest proves nothing."""
    if "cpp" not in running_backends():
        pytest.skip(f"cpp does not run here: {missing_backends().get('cpp')}")
    launch = module("cpp").launch

    def forgetful(op, args, outputs):  # type: ignore[no-untyped-def]
        launch(op, args, outputs)
        for out in outputs:
            out.reshape(-1)[-1:] = float("nan") if out.dtype.is_floating_point else 0xA5

    monkeypatch.setattr(module("cpp"), "launch", forgetful)
    assert main(["--backend", "cpp", "--examples", "40", "soft_quantize", "pack_codes"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG cpp     soft_quantize soft_quantize on cpp, output 0: 1 of " in shown
    assert "WRONG cpp     pack_codes" in shown
