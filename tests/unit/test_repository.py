"""The repository as text: import levels, banned names, agreeing version ranges, files that stay clean and small."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hybridlab"

# An import only points to an earlier line. A package (kernels/) counts as one module.
LEVELS = (
    ("errors", "paths", "counters", "architectures", "fusedops", "layout", "clocks", "ranges", "tokens", "progress",
     "collector", "pools", "grouped", "files"),
    ("config", "stats", "gpus", "ops", "checkpoint", "buckets", "static", "looks", "schemas", "manifests", "admission",
     "tuning", "events", "children", "handover"),
    ("engines", "paperconfig", "published", "started"),
    ("environment", "cells", "names", "workload", "tallies", "kerneltables", "tails", "steadiness", "growth", "limits",
     "kineto", "nsys", "gaps", "papersamples"),
    ("kernels", "records", "request", "parameters", "frames", "sampling", "readback", "plan", "telemetry"),
    ("models",),
    ("outlines", "link", "experts", "tape", "plots", "policies", "costs", "restarts", "perfetto", "store", "sweeps",
     "export"),
    ("lowering", "boxes", "times", "panels", "answers", "conversation", "session"),
    ("tracing", "views", "timeline", "fused", "nearties", "traceviews"),
    ("verify", "pieces", "tiles", "loop"),
    ("partitioning", "graphs", "tune"),
    ("cache", "selftest"),
    ("behind", "bench", "opbench"),
    ("machine", "roofline"),
    ("predict",),
    ("executors", "lookup"),
    ("lowered",),
    ("engine",),
    ("worker", "client"),
    ("runtime",),
    ("measure", "report", "terminal"),
    ("serving", "disturbing", "kernelanswers", "kernelviews", "soundness", "memory", "overhead", "coldstart",
     "tracetables", "cachetables", "crossing", "peers", "peerwords", "judging", "firstcalls", "liveviews"),
    ("capturing", "hfpeers", "enginepeers", "ledger", "papertables", "wording", "explorer"),
    ("experiment", "notebooks", "finished", "looking"),
    ("kernellab", "tracelab", "systemlab", "peerlab", "jobs", "outcomes", "papertimes", "paperviews", "live",
     "soak"),
    ("cachelab", "kernelbench", "systembench", "profiling", "peerbench", "cluster", "listing", "liveprocess",
     "soaking"),
    ("papercosts",),
    ("paperlab",),
    ("committed", "cachebench", "sweeping"),
    ("reproduce", "widgets"),
    ("cli",),
    ("__main__", "__init__"),
)
LEVEL = {module: number for number, line in enumerate(LEVELS) for module in line}
LINES_LIMIT = 300
FILE_LIMIT_BYTES = 12 * 2**20

# Modules, and names in modules, that execute what they are given: unpickle it, import it, or hand it to a shell.
BANNED = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "runpy",
    "multiprocessing", "socketserver", "xmlrpc", "ray",  # these unpickle too, or listen to anybody
    "torch.load", "torch.serialization", "torch.hub", "torch.package", "torch.multiprocessing", "torch.jit.load",
    "torch.export.load", "os.system", "os.popen", "pandas.read_pickle", "pandas.eval", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__",
    "importlib.import_module", "importlib.__import__", "importlib.machinery", "importlib.util.spec_from_file_location",
}
BANNED_BUILTINS = {"eval", "exec", "compile", "__import__", "__builtins__"}
SAFE = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "weights_only": True}  # or not given
ALLOWED = {
    ("hybridlab/__init__.py", "importlib.import_module"): "the public names, each from the module beside it",
    ("hybridlab/gpus.py", "importlib.import_module"): "NVML's bindings, by their name there",
    ("hybridlab/peers.py", "importlib.import_module"): "the adapter that a table of the package names",
    ("hybridlab/started.py", "runpy"): "a module of the package, as `python -m` runs it",
    ("hybridlab/checkpoint.py", "trust_remote_code"): "the reason for which a config that sets it is refused",
    ("hybridlab/cluster.py", "ray"): "only there, and SECURITY.md says what it takes away",
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def module_of(path: Path) -> str:
    """The first name below the package: `kernels` for everything in kernels/."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules() -> set[str]:
    return {module_of(path) for path in sources()}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- imports ----------------------------------------------------------------------------------------------------

class Imports(ast.NodeVisitor):
    """The modules of the package that a file imports, also inside functions, but not for type checking alone."""

    def __init__(self) -> None:
        self.found: set[tuple[str, int]] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "hybridlab":
                self.found.add((alias.name.partition(".")[2].split(".")[0] or "__init__", node.lineno))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = (node.module or "").split(".")
        if node.level:
            self.found.add((f"relative import of {node.module}", node.lineno))
        elif parts == ["hybridlab"]:
            self.found |= {(alias.name if alias.name in LEVEL else "__init__", node.lineno) for alias in node.names}
        elif parts[0] == "hybridlab":
            self.found.add((parts[1], node.lineno))


def upward_imports(source: str, module: str) -> list[str]:
    """Imports in `source` that point to the same or a later level."""
    imports = Imports()
    imports.visit(ast.parse(source))
    return [f"line {line}: {module} imports {name}" for name, line in sorted(imports.found, key=lambda pair: pair[1])
            if name != module and LEVEL.get(name, len(LEVELS)) >= LEVEL[module]]


def test_every_module_has_a_level() -> None:
    """Prevents a new module from escaping the level check."""
    assert modules() <= set(LEVEL), f"give a line of LEVELS to {sorted(modules() - set(LEVEL))}"


def test_imports_point_to_lower_levels() -> None:
    """Prevents import cycles, lazy ones included: they decide at run time which half of a module exists."""
    wrong = [f"{shown(path)} {problem}" for path in sources() if module_of(path) in LEVEL
             for problem in upward_imports(path.read_text(), module_of(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", [
    "from hybridlab.runtime import Runtime", "import hybridlab.records", "def f():\n    from hybridlab import models",
    "from hybridlab import Runtime", "from .errors import ModelError", "from hybridlab.absent import x",
])
def test_an_upward_import_is_seen(source: str) -> None:
    """Prevents the level check from passing because it sees nothing."""
    assert upward_imports(source, "config")


@pytest.mark.parametrize("module", ["plots", "widgets"])
def test_drawing_needs_no_torch(module: str) -> None:
    """Prevents seconds of start-up, and a GPU context, in a process that only draws recorded rows."""
    if not (PACKAGE / f"{module}.py").exists():
        assert module != "plots"
        pytest.skip(f"{module} does not exist yet")
    code = f"import sys, hybridlab.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# --- names ------------------------------------------------------------------------------------------------------

def banned(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each use of what can execute data, under whatever name it was imported."""
    tree = ast.parse(source)
    known = {"pd": "pandas"} | dict(imported(tree))

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        found = list[str]()
        match node:
            case ast.Import():
                found = [alias.name for alias in node.names]
            case ast.ImportFrom():
                found = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
            case ast.Name(id=name, ctx=ast.Load()):  # of a variable that is named like a module nothing is known
                found = [known[name]] if name in known else [name] if name in BANNED_BUILTINS else []
            case ast.Attribute():
                found = [dotted(node)]
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]):
                found = [f"{dotted(owner)}.{name}"]
        yield from ((node.lineno, name) for name in found
                    if name in BANNED_BUILTINS or any(under(name, bad) for bad in BANNED))
        yield from ((node.lineno, name) for name, value in settings(node) if name in SAFE and not (
            isinstance(value, ast.Constant) and value.value is SAFE[name]))


def under(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What a name that a file imports stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def settings(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names with what they are set to: arguments of a call, items of a dictionary."""
    match node:
        case ast.Call():
            yield from ((keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg)
        case ast.Dict():
            yield from ((key.value, value) for key, value in zip(node.keys, node.values, strict=True)
                        if isinstance(key, ast.Constant) and isinstance(key.value, str))
        case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=str(name)))]):
            yield name, node.value


def test_nothing_can_execute_data() -> None:
    """Prevents a checkpoint, config, prompt or result file from running as code."""
    texts = {shown(path): path.read_text() for path in [*sources(), *sorted((ROOT / "data").rglob("*.py"))]}
    for path in notebooks():
        cells = json.loads(path.read_text())["cells"]
        texts[shown(path)] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    used, wrong = set(), []
    for name, text in texts.items():
        for line, use in banned(text):
            allowed = {(file, what) for file, what in ALLOWED if file == name and under(use, what)}
            used |= allowed
            wrong += [] if allowed else [f"{name} line {line}: {use}"]
    assert not wrong, "\n".join(wrong)
    assert used == set(ALLOWED), "something is allowed and no longer used"


def test_tests_execute_no_data_either() -> None:
    """Prevents a test that loads what it should only show to be refused. One may make a pickle, to send it."""
    allowed = {("tests/unit/test_frames.py", "pickle.loads"),  # where one must go off
               ("tests/unit/test_models.py", "trust_remote_code"),  # in a config that must be refused
               ("tests/unit/test_readme.py", "runpy"), ("tests/unit/test_readme.py", "runpy.run_path")}  # the README's
    wrong = [f"{shown(path)} line {line}: {use}" for path in sorted((ROOT / "tests").rglob("*.py"))
             for line, use in banned(path.read_text())
             if (shown(path), use) not in allowed and use not in ("pickle", "pickle.dumps")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "eval('1')", "exec('1')", "compile('1', 'x', 'eval')",
    "__import__('x')", "torch.load('x')", "from torch import load", "f(trust_remote_code=True)", "os.system('ls')",
    "run('ls', shell=True)", "np.load('x', allow_pickle=True)", "pd.read_pickle('x')", "run = eval", "map(exec, x)",
    "import torch as t\nt.load('x')", "import torch.hub", "from torch import hub", "import multiprocessing.pool",
    "import yaml\nyaml.load(x)", "import builtins\nbuiltins.exec('1')", "from torch.multiprocessing import Pool",
    "f(trust_remote_code=flag)", "f(**{'trust_remote_code': True})", "f(trust_remote_code=0)", "f(weights_only=flag)",
    "f(allow_pickle=flag)", "run(x, shell=flag)", "kept['trust_remote_code'] = True", "dict(trust_remote_code=True)",
    "torch.serialization.load(x)", "from torch.serialization import load as read", "torch.jit.load(x)",
    "from torch import jit as j\nj.load(x)", "torch.package.PackageImporter(x)", "import torch.package as p",
    "getattr(torch, 'load')(x)", "import torch as t\ngetattr(t, 'load')", "getattr(torch.jit, 'load')",
    "importlib.import_module(x)", "from importlib import import_module as i\ni(x)", "import runpy", "__builtins__['x']",
    "from importlib.util import spec_from_file_location", "import ray", "from ray.util import x", "import ray as r",
])
def test_a_banned_name_is_seen(source: str) -> None:
    """Prevents the ban from passing because it sees nothing."""
    assert list(banned(source))


def test_harmless_namesakes_pass() -> None:
    """Prevents the ban from hitting torch.compile, re.compile and model.eval, which execute nothing of the kind."""
    assert not list(banned("torch.compile(f)\nre.compile('x')\nmodel.eval()\nf(trust_remote_code=False)\njson.load(x)"
                           "\ngetattr(torch, 'float16')\nf(weights_only=True)\nfrom importlib import metadata"
                           "\ntorch.jit.script(f)\nimport array\narray.array('b')\nself.codes\nyaml.safe_load(x)"))


# --- documents and files ----------------------------------------------------------------------------------------

def test_readme_map_has_one_sentence_for_each_module() -> None:
    """Prevents the map a newcomer reads from drifting away from the tree."""
    text = (ROOT / "README.md").read_text()
    assert "\n## Map\n" in text, "README.md needs the section '## Map'"
    section = text.split("\n## Map\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)/?` \|(.*)\|\s*$", section, flags=re.MULTILINE)
    names = [name for name, _ in rows]
    assert len(names) == len(set(names)), "a module stands twice in the map"
    assert set(names) == modules() - {"__init__", "__main__"}
    assert all(len(sentence.strip(" |")) > 20 for _, sentence in rows)


def test_readme_ci_and_makefile_name_the_same_commands() -> None:
    """Prevents a README whose commands are not those that CI runs and the Makefile knows."""
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "make test" in readme
    assert "make test" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    shown_help = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    listed = shown_help.stdout
    for command in ("reproduce", "test", "lab", "lint", "clean"):
        assert re.search(rf"^ +{command} ", listed, flags=re.MULTILINE), f"make help does not list {command}"
    for command in set(re.findall(r"^ *make (\w+)", readme, flags=re.MULTILINE)):
        assert re.search(rf"^ +{command} ", listed, flags=re.MULTILINE), f"README names make {command}"


def test_what_python_compiles_is_kept() -> None:
    """pip compiles no package ahead, so where nothing is kept each process of a test compiles PyTorch anew."""
    shown = subprocess.run(["make", "-s", "-f", "Makefile", "-f", "-", "shown"], cwd=ROOT, input="shown: ; @env\n",
                           capture_output=True, text=True, timeout=60,
                           env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}).stdout
    assert "TORCHINDUCTOR_CACHE_DIR=" in shown
    assert "PYTHONDONTWRITEBYTECODE" not in shown


def test_modules_stay_short() -> None:
    """Prevents a module from growing past what one reads in one go."""
    long = {shown(path): n for path in sources() if (n := len(path.read_text().splitlines())) > LINES_LIMIT}
    assert not long


def test_every_module_and_test_says_what_it_is_for() -> None:
    """Prevents a module without its sentence, and a test that does not name the failure it prevents."""
    silent = [shown(path) for path in sources() if not ast.get_docstring(ast.parse(path.read_text()))]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tests = (node for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
        silent += [f"{shown(path)}::{node.name}" for node in tests if not ast.get_docstring(node)]
    assert not silent, "\n".join(silent)


def test_committed_notebooks_are_clean() -> None:
    """Prevents outputs, machine names and run times from entering the history with a notebook."""
    assert notebooks()
    for path in notebooks():
        notebook = json.loads(path.read_text())
        assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}, shown(path)
        for number, cell in enumerate(notebook["cells"]):
            where = f"{shown(path)} cell {number}"
            assert set(cell["metadata"]) <= {"tags"}, where
            assert not cell.get("outputs"), where
            assert cell.get("execution_count") is None, where


def test_no_file_is_large() -> None:
    """Prevents a checkpoint or a trace from making every clone slow for ever."""
    folders = ("data", "figures", "notebooks", "hybridlab", "tests")
    kept = (path for folder in folders for path in (ROOT / folder).rglob("*")
            if path.is_file() and "local" not in path.relative_to(ROOT).parts)
    large = {shown(path): size for path in kept if (size := path.stat().st_size) > FILE_LIMIT_BYTES}
    assert not large


# --- versions ---------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Left to the resolver: its newest release depends on the Python version.
UNPINNED = {"numpy"}
# pip's name -> conda-forge's, where they differ.
CONDA_NAMES = {"torch": "pytorch-gpu", "huggingface-hub": "huggingface_hub", "matplotlib": "matplotlib-base",
               "jupyter-client": "jupyter_client", "ray": "ray-core", "playwright": "playwright-python"}
# conda-forge's pytorch depends on the one triton it was built with, so naming it could only break that.
NOT_IN_CONDA = {"triton"}
CONDA_SPEC = re.compile(r"(?P<name>[a-z0-9_][a-z0-9_.-]*)(?P<range>(?:(?:>=|<=|==|!=|<|>|=)[0-9][0-9a-z.*]*,?)*)")


def declared() -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    requirements = [Requirement(text) for text in texts]
    assert len({r.name for r in requirements}) == len(requirements), "a dependency is declared twice"
    return {canonicalize_name(r.name): r for r in requirements}


def conda_range(text: str) -> tuple[str, SpecifierSet, str]:
    """Name, range and fuzzy pin ("3.12" of "=3.12") of a conda spec; anything conda would refuse raises."""
    match = CONDA_SPEC.fullmatch(text)
    if not match or match["range"].endswith(","):
        raise ValueError(f"{text!r} is no conda spec")
    pin = re.fullmatch(r"=([0-9.]+)", match["range"])
    return match["name"], SpecifierSet(f"=={pin[1]}.*" if pin else match["range"]), pin[1] if pin else ""


def environment() -> dict[str, object]:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_environment_file_has_the_form_conda_reads() -> None:
    """Prevents a file that conda refuses, or one that mixes channels whose builds do not fit together."""
    found = environment()
    assert set(found) == {"name", "channels", "dependencies", "variables"}
    assert found["channels"] == ["conda-forge", "nodefaults"]
    assert all(isinstance(value, str) for value in found["variables"].values())
    plain = [item for item in found["dependencies"] if isinstance(item, str)]
    names = [conda_range(item)[0] for item in plain]
    assert len(names) == len(set(names))
    assert {"python", "pip", "pytorch-gpu", "cuda-version", "gxx_linux-64", "nsight-systems-cli"} <= set(names)
    assert [item for item in found["dependencies"] if not isinstance(item, str)] == [{"pip": ["-e ."]}]
    python = next(conda_range(item)[2] for item in plain if item.startswith("python="))
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("text", ["python=>3.11", "a >=1 <2", "a>=1,", "a~1", "A=1"])
def test_wrong_conda_spec_is_seen(text: str) -> None:
    """Prevents the check of environment.yml from accepting what conda refuses."""
    with pytest.raises(ValueError, match="no conda spec"):
        conda_range(text)


def test_environment_agrees_with_pyproject() -> None:
    """Prevents conda users from getting other versions, or fewer packages, than pip users."""
    plain = [conda_range(item) for item in environment()["dependencies"] if isinstance(item, str)]
    ranges = {name: (specifiers, pin) for name, specifiers, pin in plain}
    wrong = []
    for name, requirement in declared().items():
        if name in NOT_IN_CONDA:
            continue
        specifiers, pin = ranges.get(CONDA_NAMES.get(name, name), (None, ""))
        agrees = Version(pin) in requirement.specifier if pin else specifiers == requirement.specifier
        if not agrees:
            wrong.append(f"{requirement} in pyproject.toml, {specifiers} in environment.yml")
    assert not wrong, "\n".join(wrong)


def test_constraints_pin_what_pyproject_allows() -> None:
    """Prevents `make` from installing a set that the published ranges exclude, or one that is pinned only in part."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}
    assert set(pins) == set(declared()) - UNPINNED
    for name, specifier in pins.items():
        (pin,) = specifier
        assert pin.operator == "==", name
        assert Version(pin.version) in declared()[name].specifier, f"{name} {specifier}"
    assert pins["torch"] == SpecifierSet("==2.13.0")
    assert pins["triton"] == SpecifierSet("==3.7.1")


def test_wheel_carries_the_embedded_data() -> None:
    """Prevents an installed package without the model, prompts and tiles that every command starts from."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["sources"] == {"data": "hybridlab/data"}
    for folder in ("/data/models/tiny", "/data/prompts", "/data/tuning", "/data/paper"):
        assert folder in wheel["include"]
        assert any((ROOT / folder.strip("/")).iterdir()), folder
