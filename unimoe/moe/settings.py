"""Plain settings of MoE layers: presets, the flat keys of 0.1, and what lies over what."""

import logging
from collections.abc import Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from unimoe.errors import UserError

from .parts import ROUTERS, nearest

log = logging.getLogger(__name__)

FLAT_KEYS: dict[str, tuple[str, str, Any]] = {
    "router_init_std": ("router", "init_std", 0.02),
    "top_k": ("router", "k", 2),
    "top_p": ("router", "p", 0.7),
    "null_experts": ("router", "null_experts", 0),
    "gradient_estimator": ("router", "gradient_estimator", None),
    "mixer": ("router", "gradient_estimator", None),
    "gating": ("router", "gating", "topk_softmax"),
    "renormalize": ("router", "renormalize", True),
    "slices": ("experts", "slices", 1),
    "shared_experts": ("shared", "count", 0),
    "shared_size": ("shared", "size", None),
    "balance_coef": ("losses", "balance", 0.01),
    "z_coef": ("losses", "z", 0.0),
}
"""The flat keys of 0.1, as saved models have them: part, name and default."""


def presets() -> dict[str, Any]:
    """The presets of ``configs/moe``: name -> file."""
    folder = files("unimoe.configs").joinpath("moe")
    found = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in found if file.name.endswith(".yaml")}


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, by its name or by the path of a YAML file.

    Raises:
        UserError: there is none, or the file is no mapping.
    """
    known = presets()
    file = Path(name) if str(name).endswith((".yaml", ".yml")) else known.get(name)
    if file is None or not file.is_file():
        raise UserError(f"moe.preset: unknown {name!r}{nearest(name, known)}")
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    return mapping(found, f"preset {name}")


def nested_settings(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with the flat keys of 0.1 in their places."""
    nested = {key: value for key, value in values.items() if key not in ("num_experts", *FLAT_KEYS)}
    old = {key: value for key, value in values.items() if key in FLAT_KEYS}
    for name in ("router", "experts", "capacity"):
        if isinstance(nested.get(name), str):
            nested[name] = {"kind": nested[name]}
    kind = nested.get("router", {}).get("kind", "top_k") if old else "top_k"
    for key, value in old.items():
        part, name, default = FLAT_KEYS[key]
        if part == "router" and name not in ROUTERS.find(kind).settings:
            if value != default:  # a saved model has them all
                log.warning("moe.%s is ignored: router %s has no such setting", key, kind)
            continue
        nested[part] = {**({"kind": kind} if part == "router" else {}), **nested.get(part, {}), name: value}
    if "num_experts" in values:
        number, slices = values["num_experts"], nested.get("experts", {}).get("slices", 1)
        at_least("num_experts", number, 1)
        at_least("slices", slices, 1)
        if number % slices:
            raise UserError(f"moe.num_experts is {number}, expected a multiple of {slices} (moe.slices)")
        nested["experts"] = {**nested.get("experts", {}), "copies": number // slices}
    return nested


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Settings of MoE layers: ``over`` where both say something; a part of another kind replaces the whole
    entry."""
    merged = deepcopy(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            same = value.get("kind", below.get("kind")) == below.get("kind")
            value = {**below, **value} if same else value
        merged[key] = value
    return merged


def mapping(given: Any, where: str) -> dict[str, Any]:
    """Raises a UserError for anything but a mapping."""
    if not isinstance(given, dict):
        raise UserError(f"moe.{where} is {given!r}, expected settings: {{name: value}}")
    return given


def at_least(key: str, value: Any, least: int) -> None:
    """Raises a UserError for anything but a whole number from ``least`` on."""
    if not isinstance(value, int) or value < least:
        raise UserError(f"moe.{key} is {value!r}, expected at least {least}")


def parse_settings(texts: Sequence[str], copies: bool = True) -> dict[str, Any]:
    """Settings of MoE layers from ``key=value`` texts, values read as YAML; ``router.k=1`` is of a part.

    Args:
        texts: as given on the command line.
        copies: whether the number of experts may be set; elsewhere it follows from their sources.

    Raises:
        UserError: a text of another form, or one that sets what it must not.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or (not copies and key in ("num_experts", "experts.copies")):
            limit = "" if copies else " (not the number of experts)"
            raise UserError(f"--moe {text}: expected KEY=VALUE, such as placement=all{limit}")
        part, dot, name = key.partition(".")
        found = yaml.safe_load(value)
        settings = merge(settings, {part: {name: found}} if dot else {key: found})
    return settings


def named(given: Any, where: str, kind: str) -> dict[str, Any]:
    """Settings with their ``kind``; a string is the kind alone."""
    return {"kind": given} if isinstance(given, str) else {"kind": kind, **mapping(given, where)}


def check_known(where: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises a UserError for a setting that is none of ``known``."""
    for key in given:
        if key not in known:
            raise UserError(f"moe.{where} has an unknown key {key!r}{nearest(key, known)}")
