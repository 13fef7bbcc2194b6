"""Options of generation: sampling, the terminal chat, the server and the page of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from gpt_kit_hf.options.declare import REQUIRED, Options, option

DecodingDtype: TypeAlias = Literal["auto", "float16", "int8"]
Overflow: TypeAlias = Literal["error", "slide"]
EngineName: TypeAlias = Literal["auto", "torch", "llama.cpp"]


def device_option() -> Any:
    """Declare the device that a model runs on."""
    return option(
        "cpu",
        "device to run on, such as cuda for an NVIDIA or AMD GPU; cuda:1 is the second one",
        choices=("cpu", "cuda", "mps", "xpu"),
        normalize=lambda device: device.partition(":")[0],
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """How the next token is chosen."""

    temperature: float = option(0.8, "sampling temperature; 0 always takes the most likely token", minimum=0)
    top_k: int | None = option(
        50,
        "sample from the k most likely tokens; none, or more than the vocabulary has, samples from all",
        minimum=1,
        unset="all tokens",
    )
    dtype: DecodingDtype = option(
        "auto",
        "precision of the weight matrices while decoding; auto is the model's own, float16 and int8 are faster on a "
        "CPU and less exact",
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """The model, and what computes it."""

    model_name_or_path: str = option(
        REQUIRED, "folder of a run or model, Hub id, or GGUF file", names="model_or_gguf", metavar="MODEL"
    )
    engine: EngineName = option(
        "auto",
        "what computes the model: torch, or llama.cpp (extra llama), which runs GGUF files on a CPU; auto is "
        "llama.cpp for a GGUF file, else torch",
    )


@dataclass(frozen=True, kw_only=True)
class LoadedModelOptions(EngineOptions):
    """The model, and where it runs."""

    device: str = device_option()


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions, LoadedModelOptions):
    """A prompt, and how a model continues it."""

    positionals: ClassVar[tuple[str, ...]] = ("model_name_or_path",)

    prompt: str = option(
        "",
        "text to continue; without one, the model starts a new document, or a line if it was trained on a single one",
    )
    max_new_tokens: int | None = option(
        None, "most tokens to add", minimum=1, unset="200, or what is left of the model's context"
    )
    seed: int | None = option(
        None, "seed that makes the sample repeatable", minimum=0, below=2**63, unset="a different sample each time"
    )
    overflow: Overflow = option(
        "error",
        "what to do beyond the model's context: stop with an error, or slide: predict from the last tokens only",
    )


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """How an answer is generated."""

    max_new_tokens: int = option(200, "most tokens per answer", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ChatCommandOptions(ChatOptions, LoadedModelOptions):
    """A model to talk with."""

    positionals: ClassVar[tuple[str, ...]] = ("model_name_or_path",)

    seed: int | None = option(
        None, "seed that makes the answers repeatable", minimum=0, below=2**63, unset="different answers each time"
    )


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """A model to serve, and the address to serve it at."""

    positionals: ClassVar[tuple[str, ...]] = ("model_name_or_path",)

    host: str = option(
        "127.0.0.1",
        "address to listen on; there is no authentication, so anyone who can reach another address can use the server",
    )
    port: int = option(8000, "port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    cors_allow_origins: list[str] = option(
        [], "origins whose web pages may use the server from a browser, such as http://localhost:3000; * for all"
    )


def page_port_option() -> Any:
    """Declare the port of a page on this machine."""
    return option(0, "port of the page on 127.0.0.1; 0 takes a free one", minimum=0, maximum=65535)


def page_open_option() -> Any:
    """Declare whether a page is opened in a browser."""
    return option(True, "open the page in a browser, if there is a terminal and a screen")


@dataclass(frozen=True, kw_only=True)
class PlayOptions(Options):
    """The models to play with, and their page."""

    positionals: ClassVar[tuple[str, ...]] = ("models",)

    models: list[str] = option(
        REQUIRED,
        "folders of runs or models, or Hub ids; the checkpoints of a run can be chosen on the page",
        names="model",
        metavar="MODEL",
    )
    device: str = device_option()
    port: int = page_port_option()
    open: bool = page_open_option()
