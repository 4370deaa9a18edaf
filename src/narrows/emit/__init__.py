"""Launch settings of training frameworks and serving engines: one template per framework and version."""

from collections.abc import Callable
from dataclasses import dataclass

from narrows.emit import accelerate_1_10, deepspeed_0_17, megatron_0_14, sglang_0_5, torchtitan_0_2, vllm_0_19
from narrows.emit.deployment import Deployment
from narrows.emit.run import Run
from narrows.errors import NarrowsError, closest
from narrows.graph import Graph
from narrows.layout import Layout
from narrows.search.deployments import Config


@dataclass(frozen=True, slots=True)
class Template:
    """How the settings of one version of a framework are written, and the file that they usually lie in."""

    write: Callable[[Run], str]
    file: str


TEMPLATES = {
    "megatron-0.14": Template(megatron_0_14.write, "launch.sh"),
    "deepspeed-0.17": Template(deepspeed_0_17.write, "ds_config.json"),
    "torchtitan-0.2": Template(torchtitan_0_2.write, "train.toml"),
    "accelerate-1.10": Template(accelerate_1_10.write, "fsdp.yaml"),
}


def emit(name: str, layout: Layout, graph: Graph, sequence: int, devices_per_node: int) -> str:
    """The settings that make a framework (`megatron`, or with its version `megatron-0.14`) run a layout.

    `sequence` is in tokens. Raises NarrowsError that names the first part of the layout that the framework lacks.
    """
    known = [key for key in TEMPLATES if name in (key, key.partition("-")[0])]
    if not known:
        raise NarrowsError(f"there is no template {name!r}.", where="emit", remedy=closest(name, list(TEMPLATES)))
    for field, shares in (("layers", layout.layers), ("shares", layout.shares)):
        if shares:
            remedy = "Plan on one group of devices."
            raise NarrowsError(f"the framework shares out evenly, and not {shares}.", where=f"emit: {field}", remedy=remedy)
    return TEMPLATES[known[-1]].write(Run(known[-1], layout, graph, sequence, devices_per_node))


ENGINES: dict[str, Callable[[Deployment], str]] = {"vllm-0.19": vllm_0_19.write, "sglang-0.5": sglang_0_5.write}


def emit_server(name: str, config: Config, model: str, context: int = 0) -> str:
    """The commands that make an engine (`vllm`, or with its version `vllm-0.19`) serve a model as a deployment says.

    Raises NarrowsError that names the first part of the deployment that the engine lacks.
    """
    known = [key for key in ENGINES if name in (key, key.partition("-")[0])]
    if not known:
        raise NarrowsError(f"there is no template {name!r}.", where="emit", remedy=closest(name, list(ENGINES)))
    return ENGINES[known[-1]](Deployment(known[-1], config, model, context))
