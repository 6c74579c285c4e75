"""The arrows between the parts, read from the import statements; names that join an op with its kernels; what an import loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qupedkern.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NATIVE = re.compile(r"^qupedkern\._C_")
INFRASTRUCTURE = {"lut_bf16", "lut_regimes", "lut_tiles", "parallel"}  # csrc/cpu/*.cpp that is no kernel

# Part -> what it must not import, by the start of a module's full name. Parts are folders or files.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "qupedkern": ("fl", "tests", "bench"),
    "qupedkern/ops": (
        "qupedkern.kernels",
        "qupedkern._C_",
        "qupedkern.backends.",  # the package alone may be named, no backend in it
        "qupedkern.nn",
        "qupedkern.optim",
        "qupedkern.files",
        "qupedkern.testing",
        "triton",
    ),
    "qupedkern/backends": ("qupedkern.ops", "qupedkern.nn", "qupedkern.optim", "qupedkern.files", "qupedkern.testing"),
    "qupedkern/nn": (
        "qupedkern.backends",
        "qupedkern.kernels",
        "qupedkern._C_",
        "qupedkern.optim",
        "qupedkern.testing",
        "triton",
    ),
    "qupedkern/optim": ("qupedkern.backends", "qupedkern.kernels", "qupedkern._C_", "qupedkern.testing", "triton"),
    "fl": ("qupedkern.backends", "qupedkern.kernels", "qupedkern._C_", "qupedkern.testing", "triton", "tests", "bench"),
    "bench": ("tests",),
    "examples": ("qupedkern.", "fl", "tests", "bench"),  # what a user has: the public interface
}


def sources(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in it: `from a import b` gives both a and a.b."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return found


def names(forbidden: str, imported: str) -> bool:
    """Whether an import reaches a forbidden module; one that ends in a dot or underscore is matched as a beginning."""
    if forbidden.endswith((".", "_")):
        return imported.startswith(forbidden)
    return imported == forbidden or imported.startswith(forbidden + ".")


def modules_in(part: str) -> set[str]:
    return {module_of(path) for path in sources(part)}


@pytest.mark.parametrize("part", FORBIDDEN)
def test_no_arrow_points_the_wrong_way(part: str) -> None:
    assert sources(part), f"{part} has no Python files: the layout moved, and this test with it"
    backends = modules_in("qupedkern/backends")
    for path in sources(part):
        for imported in imports(path):
            for forbidden in FORBIDDEN[part]:
                if forbidden == "qupedkern.backends.":
                    assert imported == "qupedkern.backends" or imported not in backends, f"{path} imports {imported}"
                else:
                    assert not names(forbidden, imported), f"{path} imports {imported}"


def test_the_package_does_not_need_its_own_test_helpers() -> None:
    for path in sources("qupedkern"):
        if "testing" not in path.relative_to(ROOT).parts:
            assert not any(names("qupedkern.testing", i) or names("hypothesis", i) for i in imports(path)), path


def test_kernels_import_only_their_own_helpers_and_name_an_op() -> None:
    for path in sources("qupedkern/kernels"):
        ours = {i for i in imports(path) if names("qupedkern", i) and i not in ("qupedkern", "qupedkern.kernels")}
        assert all(i.startswith("qupedkern.kernels._") for i in ours), (
            path
        )  # their helpers, nothing else of the package
        assert path.stem in OPS or path.stem.startswith("_"), f"{path} names no op"


def test_an_op_lives_in_the_file_of_its_name_and_a_gradient_beside_its_forward() -> None:
    files = {path.stem for path in sources("qupedkern/ops") if not path.stem.startswith("_")}
    assert files == {op.removesuffix("_backward") for op in OPS}


def test_every_native_kernel_names_an_op_and_is_declared_and_bound() -> None:
    files = {path.stem for path in (CSRC / "cpu").glob("*.cpp")} - INFRASTRUCTURE
    assert files, "csrc/cpu holds no kernels: the layout moved, and this test with it"
    assert files <= set(OPS)
    declared = set(re.findall(r"^void (\w+)\(", (CSRC / "kernels.h").read_text(encoding="utf-8"), re.MULTILINE))
    bound = re.findall(r'kernel\(module, "(\w+)", &cpu::(\w+)', (CSRC / "bindings.cpp").read_text(encoding="utf-8"))
    assert {name.removeprefix("foreach_") for name in declared} == files  # one tensor or many: the same file
    assert {name for name, _ in bound} == declared
    assert all(name == function for name, function in bound)


def test_every_cuda_kernel_names_an_op_and_is_declared_and_bound() -> None:
    cuda = CSRC / "cuda"
    text = (cuda / "kernels.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"^void (\w+)\(Stream", text, re.MULTILINE))
    bound = re.findall(r'kernel\(module, "(\w+)", &cuda::(\w+)', (cuda / "bindings.cpp").read_text(encoding="utf-8"))
    assert {name for name, _ in bound} == declared
    assert all(name == function for name, function in bound)
    assert declared <= set(OPS)
    scratch = set(re.findall(r"^int64_t (\w+)_workspace\(", text, re.MULTILINE))
    assert scratch == {name for name in declared if re.search(rf"^void {name}\([^;]*View workspace\);", text, re.M)}


def test_cuda_sources_reach_cuda_through_one_file() -> None:
    doors = ("device.h", "launch.h", "platform.h")
    for path in (CSRC / "cuda").iterdir():
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
        assert path.name in doors or not any(h.startswith(("cuda", "mma", "cooperative")) for h in included), path


def test_no_native_source_includes_torch_and_only_the_bindings_include_pybind11() -> None:
    files = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".hpp", ".cpp", ".cu", ".cuh")]
    assert files
    for path in files:
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.MULTILINE)
        for header in included:
            assert not header.startswith(("torch/", "ATen/", "c10/")), f"{path} includes {header}"
            python = header.startswith(("pybind11", "Python.h"))
            assert not python or path.name in ("bindings.cpp", "module.h"), f"{path} includes {header}"
            assert (header != "module.h" and not header.endswith("/module.h")) or path.name == "bindings.cpp", path


@pytest.mark.parametrize("package", ["qupedkern", "fl"])
def test_importing_loads_no_native_module_nor_heavy_dependency_and_starts_no_gpu(package: str) -> None:
    code = (
        f"import sys, {package}, torch; "
        "heavy = ('triton', 'sklearn', 'matplotlib', 'flwr', 'hypothesis'); "
        "print(sorted(m for m in sys.modules if m.split('.')[0] in heavy or '._C_' in m and m.startswith('qupedkern')), "
        "torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] False"


def test_the_readers_above_see_an_arrow_that_points_the_wrong_way(tmp_path: Path) -> None:
    """The tests of this file would pass on anything if this did not fail on something."""
    assert names("qupedkern.backends", "qupedkern.backends.cpp")
    assert not names("fl", "flake")
    assert names("qupedkern._C_", "qupedkern._C_cpu_avx2")
    assert {"qupedkern.backends", "qupedkern.backends.select"} <= imports(ROOT / "qupedkern/ops/_define.py")
    assert "qupedkern.ops._rows.column" in imports(ROOT / "qupedkern/ops/soft_quantize.py")
