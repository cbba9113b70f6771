"""The rules of CONTRIBUTING.md for every file: imports, lengths, test files."""

import ast
import os
import runpy
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}

# What is not listed is on the top floor, so a part of the core has to be entered here.
FLOORS = {
    "unimoe.errors": 0,
    "unimoe.files": 0,
    "unimoe.artifacts": 0,
    "unimoe.progress": 0,
    "unimoe.kernels": 1,
    "unimoe.encoders": 1,
    "unimoe.media": 1,  # decodes files; knows nothing of the model
    "unimoe.prepare": 1,  # fetches and converts files; knows nothing of the model
    "unimoe.moe": 2,
    "unimoe": 3,  # unimoe/__init__.py, which registers the model
    "unimoe.model": 3,
    "unimoe.compress": 3,
    "unimoe.compress.report": 4,  # draws with unimoe.analysis
    "unimoe.data": 4,
    "unimoe.analysis": 4,
    "unimoe.analysis.memory_plan": 8,  # reads the configuration of a stage
    "unimoe.inference": 5,
    "unimoe.inference.web_ui": 8,  # shows a detector beside the conversation
    "unimoe.training": 5,
    "unimoe.evaluation": 6,
    "unimoe.stages": 7,
    "unimoe.detection": 7,
    "unimoe.continual": 7,
    "unimoe.applications": 7,
    "unimoe.synthetic.sprites": 4,  # what applications draw and compose too
    "unimoe.synthetic.concepts": 4,
    "unimoe.synthetic.more_concepts": 4,
    "unimoe.synthetic.detection_scenes": 4,
    "unimoe.synthetic.weather": 4,
    "unimoe.synthetic.salient_scenes": 4,
}
TOP = 8
NEIGHBOURS = {"unimoe.stages", "unimoe.detection", "unimoe.continual"}  # they do not import one another
BARE = {"encoders", "stages", "detection", "continual", "kernels"}


@dataclass(frozen=True)
class Import:
    """One imported name: where it stands, by which module, and what it names in full."""

    where: str
    module: str
    package: str
    target: str
    relative: int


def modules() -> dict[str, Path]:
    """Module name to file, for every Python file of the package."""
    found = {}
    for name, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = file
    return found


def is_module(name: str) -> bool:
    return name in MODULES or any(other.startswith(name + ".") for other in MODULES)


def imports_of(module: str, file: Path) -> list[Import]:
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets, relative = [alias.name for alias in node.names], 0
        elif isinstance(node, ast.ImportFrom):
            relative = node.level
            parts = package.split(".")[: len(package.split(".")) - relative + 1] if relative else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            # `from package import module` names the module, `from module import name` the module as well
            targets = [f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names]
        else:
            continue
        where = f"{file.relative_to(ROOT)}:{node.lineno}"
        found += [Import(where, module, package, target, relative) for target in dict.fromkeys(targets)]
    return found


def floor(module: str) -> int:
    return FLOORS.get(module, FLOORS.get(room(module), TOP))


def room(module: str) -> str:
    """``unimoe.moe`` for ``unimoe.moe.router``."""
    return ".".join(module.split(".")[:2])


MODULES = modules()
IMPORTS = [one for module, file in MODULES.items() for one in imports_of(module, file)]
OURS = [one for one in IMPORTS if one.target.split(".")[0] == "unimoe"]


def complain(wrong: list[str]):
    assert not wrong, "\n" + "\n".join(wrong)


def test_nothing_imports_from_a_floor_above():
    def climbs(one: Import) -> bool:
        # `from unimoe import __version__` is no climb: the package itself is always loaded first
        return one.target != "unimoe" and floor(one.target) > floor(one.module)

    complain(
        [
            f"{one.where}: floor {floor(one.module)} imports {one.target} of floor {floor(one.target)}"
            for one in OURS
            if climbs(one)
        ]
    )


def circles() -> list[list[str]]:
    """Groups of files that import one another, also inside functions and for types only (Tarjan)."""
    graph = {module: sorted({one.target for one in OURS if one.module == module}) for module in MODULES}
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for target in graph[module]:
            if target not in graph or target == module:
                continue
            if target not in number:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], number[target])
        if low[module] == number[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in graph:
        if module not in number:
            visit(module)
    return found


def test_no_files_import_one_another():
    complain([" <-> ".join(group) for group in circles()])


def test_neighbours_do_not_import_one_another():
    # each folder of applications is a neighbour of the others; the files beside them are what these share
    folders = {
        f"unimoe.applications.{one.name}" for one in (ROOT / "unimoe/applications").iterdir() if one.is_dir()
    }

    def neighbour(module: str) -> str:
        application = ".".join(module.split(".")[:3])
        return application if application in folders else room(module)

    def is_neighbour(name: str) -> bool:
        return name in NEIGHBOURS | folders

    pairs = [(one, neighbour(one.module), neighbour(one.target)) for one in OURS]
    complain(
        [
            f"{one.where}: {one.module} imports its neighbour {one.target}"
            for one, here, there in pairs
            if is_neighbour(here) and is_neighbour(there) and here != there
        ]
    )


def test_relative_imports_stay_in_their_folder():
    def stays(one: Import) -> bool:
        inner = one.target.removeprefix(one.package).strip(".")
        return one.relative == 1 and "." not in inner and not is_package(one.target)

    def is_package(name: str) -> bool:
        return any(other.startswith(name + ".") for other in MODULES)

    complain(
        [
            f"{one.where}: a relative import of {one.target}, which lies in another folder; name it in full"
            for one in OURS
            if one.relative and one.target != one.package and not stays(one)
        ]
    )


def test_bare_folder_names_are_never_imported():
    complain(
        [
            f"{one.where}: {one.target}; write unimoe.{one.target}"
            for one in IMPORTS
            if one.target.split(".")[0] in BARE
        ]
    )


def test_the_ground_floor_of_kernels_is_torch_only():
    allowed = {"torch", "triton", "unimoe"} | sys.stdlib_module_names
    complain(
        [
            f"{one.where}: kernels/ imports {one.target}"
            for one in IMPORTS
            if room(one.module) == "unimoe.kernels" and one.target.split(".")[0] not in allowed
        ]
    )


def test_every_imported_package_is_declared():
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = {normal(line) for lines in (PROJECT["project"]["dependencies"], *extras) for line in lines}
    declared |= {"triton", "pip"}  # imported only where they happen to be
    provided_by = packages_distributions()
    wrong = []
    for one in IMPORTS:
        top = one.target.split(".")[0]
        if top in sys.stdlib_module_names or top == "unimoe":
            continue
        if not declared & {normal(name) for name in provided_by.get(top, [top])}:
            wrong.append(f"{one.where}: {top} is not among the dependencies of pyproject.toml")
    complain(wrong)


def normal(requirement: str) -> str:
    name = requirement
    for sign in "[<>=!~; ":
        name = name.split(sign)[0]
    return name.lower().replace("_", "-").replace(".", "-")


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_tests_and_benchmarks_use_the_full_names(folder):
    wrong = []
    for file in (ROOT / folder).rglob("*.py"):
        for one in imports_of(folder, file):
            if one.relative == 0 and one.target.split(".")[0] in BARE:
                wrong.append(f"{one.where}: {one.target}; write unimoe.{one.target}")
    complain(wrong)


def test_type_checkers_see_every_file(tmp_path):
    """pyright says nothing of what it does not find, such as folders that are links."""
    runpy.run_path(str(ROOT / "tests/tools/link_view.py"))["link_view"](tmp_path / "unimoe")
    seen = [Path(folder, file) for folder, _, files in os.walk(tmp_path) for file in files]
    names = {".".join(one.relative_to(tmp_path).with_suffix("").parts): one.resolve() for one in seen}
    assert {name.removesuffix(".__init__"): file for name, file in names.items()} == MODULES
    assert "build/view/unimoe" in PROJECT["tool"]["pyright"]["include"]


def test_no_file_is_over_500_lines_and_no_part_of_the_layer_over_200():
    files = [
        *MODULES.values(),
        *(file for name in ("tests", "benchmarks") for file in (ROOT / name).rglob("*.py")),
    ]
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    most = {file: 200 if file.is_relative_to(ROOT / "unimoe" / "moe") else 500 for file in files}
    over = {file: lines for file, lines in lengths.items() if lines > most[file]}
    complain([f"{file.relative_to(ROOT)}: {lines} lines" for file, lines in over.items()])


WITHOUT_TESTS = {
    "unimoe.__main__": "calls the command line (tests/commands/test_main.py)",
    "unimoe.commands.consolidate": "needs a run that was interrupted (tests/stages/test_resume.py)",
    "unimoe.commands.sample": "needs a trained application (tests/applications/diffusion/test_module.py)",
    "unimoe.compare.report": "writes what a comparison found (tests/compare/test_run.py)",
    "unimoe.data.errors": "faults, tested where readers raise them (tests/data/test_read.py)",
    "unimoe.detection.model.output": "data classes of the model (tests/detection/model/test_modeling.py)",
    "unimoe.kernels.arguments": "checks that every grouped operation makes (tests/kernels/test_ffn.py)",
    "unimoe.kernels.triton_linear": "products inside two operations (tests/kernels/test_triton_ffn.py)",
    "unimoe.model.registration": "known to the Auto classes (tests/model/test_modeling.py)",
    "unimoe.serve.vllm_inputs": "runs inside vLLM (tests/serve/test_vllm_plugin.py)",
    "unimoe.stages.features": "fills the cache of a stage (tests/stages)",
    "unimoe.synthetic.concepts": "a table of words (tests/synthetic/test_questions.py)",
    "unimoe.synthetic.assets.make_dialogue": "writes a file of the repository, by hand",
    "unimoe.synthetic.assets.make_speech": "writes files of the repository, by hand",
    "unimoe.testing": "tiny models for the tests",
    "unimoe.testing_hosts": "tiny models for the tests",
    "unimoe.testing_stock": "tiny models for the tests",
}
"""Modules without a test file of their own -> why, and where they are tested."""


def test_every_module_has_its_test_file():
    missing = []
    for module, file in MODULES.items():
        *folders, name = module.split(".")[1:] or ["__init__"]
        mirror = ROOT / "tests" / Path(*folders) / f"test_{name.lstrip('_')}.py"
        if file.name != "__init__.py" and not mirror.is_file():
            missing.append(module)
    assert sorted(missing) == sorted(WITHOUT_TESTS)
