"""Putting our functions where another package has its own: checked first, undone exactly."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from rlhf_fast.errors import UserError


class PatchRefused(UserError):
    """The installed package is not one that the replacements were written for."""


@dataclass(frozen=True)
class Seam:
    """One function, method or class of another package, and what takes its place."""

    target: str
    """`module:name` or `module:Class.method`."""
    replace: Callable
    """Called with the original; returns the replacement."""
    signatures: tuple[str, ...]
    """What the original must look like: `(logits, index)` for itself, `forward(self, x)` for an
    attribute. Names, order, defaults and kinds count; annotations do not. `...` at the end stands
    for any further parameters, which the replacement passes on."""
    alone: bool = False
    """Replaced in its module only, not wherever the package imports it."""
    if_importable: bool = False
    """Left out where its module cannot be imported, as then nobody can use it either."""


@dataclass(frozen=True)
class Framework:
    """A package that can be patched, and its seams by range of versions."""

    package: str
    generations: dict[str, tuple[Seam, ...]]

    def installed(self) -> str | None:
        """The installed version, without importing the package."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def range_of(self, version: str) -> str | None:
        """The generation that a version belongs to."""
        for versions in self.generations:
            if SpecifierSet(versions).contains(version, prereleases=True):
                return versions
        return None

    def seams(self) -> tuple[Seam, ...]:
        """The seams of the installed version."""
        version = self.installed()
        if version is None:
            raise PatchRefused(
                f"{self.package}: the package must be installed, got no such package; install it"
            )
        if (versions := self.range_of(version)) is not None:
            return self.generations[versions]
        known = " or ".join(f"{self.package} {versions}" for versions in self.generations)
        raise PatchRefused(
            f"{self.package}: the version must be {known}, got {version}; "
            f"install a supported version, or go without the patch"
        )

    def describe(self) -> list[str]:
        """What `patch()` has replaced in this process, or would replace, for people to read."""
        version = self.installed()
        if version is None:
            return [f"{self.package}: not installed"]
        if self.package in ACTIVE:
            targets = ACTIVE[self.package].targets
            return [f"{self.package} {version}: patched", *(f"  {t}" for t in targets)]
        try:
            targets = [seam.target for seam in self.seams()]
        except PatchRefused as refusal:
            return [f"{self.package} {version}: cannot be patched ({refusal})"]
        return [f"{self.package} {version}: not patched; patch() replaces"] + [
            f"  {target}" for target in targets
        ]

    def patch(self) -> Handle:
        """Replaces every seam, or none: all are found and checked before the first one changes.

        What is patched already stays as it is, and the handle is the same.
        """
        if self.package in ACTIVE:
            return ACTIVE[self.package]
        name = f"{self.package} {self.installed()}"
        found = [
            (seam, _original(seam, self.package, name)) for seam in self.seams() if _usable(seam)
        ]
        swaps = tuple(
            Swap(seam, original, _replacement(seam, original)) for seam, original in found
        )
        handle = ACTIVE[self.package] = Handle(self, swaps)
        _bind(self.package, [(swap.seam, swap.original, swap.replacement) for swap in swaps])
        return handle


@dataclass(frozen=True)
class Swap:
    """A seam with the two objects that change places."""

    seam: Seam
    original: object
    replacement: object


class Handle:
    """A patch in force. `undo()` ends it, and so does leaving the outermost `with` block."""

    def __init__(self, framework: Framework, swaps: tuple[Swap, ...]):
        self.framework = framework
        self.swaps = swaps
        self.blocks = 0

    def __repr__(self) -> str:
        state = "" if ACTIVE.get(self.framework.package) is self else ", undone"
        version, count = self.framework.installed(), len(self.swaps)
        return f"<{self.framework.package} {version}: {count} functions{state}>"

    @property
    def targets(self) -> list[str]:
        return [swap.seam.target for swap in self.swaps]

    def undo(self) -> None:
        """Puts the originals back. A second call does nothing."""
        if ACTIVE.get(self.framework.package) is not self:
            return
        changes = [(swap.seam, swap.replacement, swap.original) for swap in self.swaps]
        _bind(self.framework.package, changes)
        del ACTIVE[self.framework.package]

    def __enter__(self) -> Handle:
        self.blocks += 1
        return self

    def __exit__(self, *exception) -> None:
        self.blocks -= 1
        if self.blocks == 0:
            self.undo()


ACTIVE: dict[str, Handle] = {}
"""What is patched in this process, by package."""


def _bind(package: str, changes: list[tuple[Seam, object, object]]) -> None:
    """For each (seam, old, new), binds `new` wherever the package has `old`.

    Modules copy names with `from utils import f` and list functions in registries, so the names and
    dictionaries of all its loaded modules are looked through, once for all seams. Modules loaded
    later copy what they find, which undoing finds again.
    """
    everywhere = {}
    for seam, old, new in changes:
        owner, name = _owner(seam)
        if inspect.isclass(owner) or seam.alone:
            setattr(owner, name, new)
        else:
            everywhere[id(old)] = new
    for module_name, module in list(sys.modules.items()):
        if module_name == package or module_name.startswith(f"{package}."):
            for names in (vars(module), *filter(_is_dict, list(vars(module).values()))):
                for key in [key for key, value in names.items() if id(value) in everywhere]:
                    names[key] = everywhere[id(names[key])]


def _module(seam: Seam):
    with warnings.catch_warnings():
        # Modules announce themselves as experimental to those who import them.
        warnings.simplefilter("ignore")
        return importlib.import_module(seam.target.partition(":")[0])


def _usable(seam: Seam) -> bool:
    if seam.if_importable:
        try:
            _module(seam)
        except (ImportError, RuntimeError):  # RuntimeError: how lazy packages report an ImportError
            return False
    return True


def _owner(seam: Seam):
    """The module or class that holds the seam, and the name it has there."""
    *parents, name = seam.target.partition(":")[2].split(".")
    return functools.reduce(getattr, parents, _module(seam)), name


def _original(seam: Seam, package: str, found: str):
    """What stands at the seam; `found` names the package and its version."""
    try:
        owner, name = _owner(seam)
        original = vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        advice = "go without the patch"
        missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
        if missing is not None and missing.split(".")[0] != package:
            advice = f"install {missing}, which {package} imports there"
        raise PatchRefused(
            f"{package}: {seam.target} must exist, got {found} without it "
            f"({type(error).__name__}: {error}); {advice}"
        ) from error
    if original is None:  # what stands for an optional dependency that is missing
        raise PatchRefused(
            f"{package}: {seam.target} must be a function, got None in {found}: it needs "
            f"a package that is not installed; install it, or another {package}"
        )
    for signature in seam.signatures:
        attribute, bracket, parameters = signature.partition("(")
        got = signature_of(getattr(original, attribute) if attribute else original)
        if not _matches(got, bracket + parameters):
            raise PatchRefused(
                f"{package}: {seam.target} must have the signature {signature}, "
                f"got {attribute}{got} in {found}; go without the patch"
            )
    return original


def _matches(got: str, expected: str) -> bool:
    start, dots, _ = expected.partition("...)")
    return got.startswith(start) if dots else got == expected


def signature_of(function: Callable) -> str:
    """Parameters as in the source, without annotations: `(logits, index, temperature=1.0)`."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _is_dict(value) -> bool:
    return type(value) is dict


def _replacement(seam: Seam, original):
    if isinstance(original, staticmethod):
        return staticmethod(_replacement(seam, original.__func__))
    return _named_like(original, seam.replace(original))


def _named_like(original, replacement):
    """Tracebacks and `help` name the function that the framework knows."""
    if inspect.isfunction(replacement):
        functools.update_wrapper(replacement, original)
    elif inspect.isclass(replacement):
        replacement.__doc__, replacement.__qualname__ = original.__doc__, original.__qualname__
    if hasattr(replacement, "__module__"):
        replacement.__module__ = __name__.rpartition(".")[0]
    return replacement
