"""What the package promises: its names, their documentation, and a stub that says what the compiled module has."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib

import pytest

import compressed_ddp
from compressed_ddp import ops
from compressed_ddp._native import _C

PACKAGE = pathlib.Path(compressed_ddp.__file__).parent
PUBLIC = [
    "AutoExchange", "ErrorFeedbackBuffer", "ExchangeCosts", "TopKCompressor", "TopKEFState", "adam_param_groups", "all_reduce_",
    "all_reduce_gradients", "register", "topk_ef_hook",
]  # fmt: skip
STAGES = ["compensate_select_", "encode", "decode_apply_", "restore_"]


def test_all_lists_the_public_names():
    assert compressed_ddp.__all__ == PUBLIC


def test_every_imported_name_that_is_not_a_module_is_listed():
    names = {
        name
        for name, value in vars(compressed_ddp).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert names == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_what_they_are(name):
    thing = getattr(compressed_ddp, name)
    assert len(inspect.getdoc(thing)) > 40
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and (
                inspect.isfunction(value) or isinstance(value, property)
            ):
                assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_documented_alike(name):
    doc = inspect.getdoc(getattr(ops, name))
    assert "Args:" in doc
    assert "float32" in doc or "uint8" in doc
    reference = importlib.import_module("compressed_ddp.reference")
    signatures = [inspect.signature(getattr(module, name)) for module in (ops, reference)]
    assert signatures[0] == signatures[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_every_module_begins_with_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


# ---- the stub of the compiled module


def stub() -> ast.Module:
    return ast.parse((PACKAGE / "_C.pyi").read_text())


def names_of(body: list[ast.stmt]) -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names


def test_the_stub_names_what_the_compiled_module_has():
    assert names_of(stub().body) == {name for name in dir(_C) if not name.startswith("_")}


def test_the_stub_names_the_members_of_the_engine():
    (engine,) = [node for node in stub().body if isinstance(node, ast.ClassDef)]
    members = {name for name in vars(_C.Engine) if not name.startswith("_")} | {"__init__"}
    assert names_of(engine.body) == members


def test_the_stub_names_the_arguments_of_the_functions():
    for node in stub().body:
        if not isinstance(node, ast.FunctionDef) or not node.args.args:
            continue
        doc = getattr(_C, node.name).__doc__  # pybind11 writes the signature there
        for argument in node.args.args:
            assert f"{argument.arg}: " in doc, f"{node.name}({argument.arg})"


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_the_version_is_that_of_the_distribution():
    metadata = importlib.import_module("importlib.metadata")
    assert metadata.version("compressed-ddp") == compressed_ddp.__version__
