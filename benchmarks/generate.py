"""Greedy decoding by the package beside transformers' `generate` and llama.cpp, on the same weights.

`python benchmarks/generate.py` continues a prompt of 16 tokens by 64 with a 124M model: transformers' GPT-2 by
`generate` with its defaults, the package's `generate_text_autoregressive`, its weights as they are and in fewer bytes,
and, with the extra llama, llama.cpp with F32, F16 and Q8_0 weights. It checks first that all predict the same tokens,
and prints the time to the first token, tokens/s behind the first, the ratio, and the share of what memory bandwidth
allows: a token needs all weights read once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args

import llama_cpp_peer
import measure
import peers
import torch
from torch import Tensor

from gpt_kit_hf import GPTKitForCausalLM, create_model_config, generate_text_autoregressive
from gpt_kit_hf.export.native import as_native
from gpt_kit_hf.options.generation import DecodingDtype

Generate = Callable[[Tensor, int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=5)
    peers.add_work_options(parser)
    parser.set_defaults(shape="gpt2", context=1024, batch=1)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens to add")
    parser.add_argument("--dtype", nargs="+", choices=get_args(DecodingDtype), help="of ours; on a GPU only auto")
    parser.add_argument(
        "--modern", action="store_true", help="the modern shape of 124M, which transformers runs as Qwen3"
    )
    parser.add_argument("--without_llama_cpp", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--static", action="store_true", help="transformers with a static cache, compiled, too")
    with TemporaryDirectory() as folder:
        compare(parser.parse_args(), Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    work = peers.work_of(options)
    model = (modern_model(work) if options.modern else peers.our_model(work)).eval()
    native = cast("Any", as_native(model)).to(device=work.device, dtype=work.dtype).eval()
    native.set_attn_implementation("sdpa")
    model.to(work.dtype)
    methods: dict[str, Generate] = {"transformers": theirs(native)}
    if options.static:
        methods["transformers, static cache"] = theirs(native, cache_implementation="static")
    for dtype in options.dtype or (get_args(DecodingDtype) if options.device == "cpu" else ["auto"]):
        methods[f"gpt_kit_hf, dtype {dtype}"] = ours(model, dtype)
    if options.device == "cpu" and options.batch == 1 and not options.without_llama_cpp:
        methods |= llama_cpp_peer.methods(model, folder)
    prompt = torch.randint(options.vocabulary, (options.batch, options.prompt)).to(options.device)
    check(methods, prompt, options.new, exact=work.dtype == torch.float32)
    first = measure.interleaved({n: lambda g=g: g(prompt, 1) for n, g in methods.items()}, options.rounds, work.device)
    whole = measure.interleaved(
        {n: lambda g=g: g(prompt, options.new) for n, g in methods.items()}, options.rounds, work.device, warm_up=0
    )
    report(options, work, model, first, whole)


def modern_model(work: peers.Work) -> GPTKitForCausalLM:
    torch.manual_seed(0)
    config = create_model_config(
        "modern-124m", vocab_size=work.vocabulary, max_position_embeddings=work.context, zero_init_residual=False
    )
    return GPTKitForCausalLM(config).to(work.device)


def theirs(native: Any, **options: Any) -> Generate:
    def generate(prompt: Tensor, new: int) -> Tensor:
        tokens: Tensor = native.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip
        return tokens

    return generate


def ours(model: Any, dtype: str) -> Generate:
    model.generation_config.eos_token_id = None
    return lambda prompt, new: generate_text_autoregressive(model, prompt, new, dtype=cast("DecodingDtype", dtype))


def check(methods: dict[str, Generate], prompt: Tensor, new: int, *, exact: bool) -> None:
    """Say how many tokens are the same; end the program if one that keeps float32 weights predicts others."""
    expected = methods["transformers"](prompt, new)
    for name, method in methods.items():
        same = (method(prompt, new) == expected).float().mean().item()
        print(f"tokens   {same:.0%} as transformers': {name}")
        if exact and same < 1.0 and "float16" not in name and "int8" not in name and "llama.cpp" not in name:
            raise SystemExit(f"{name} predicts other tokens: not the same work")


def report(
    options: argparse.Namespace,
    work: peers.Work,
    model: torch.nn.Module,
    first: dict[str, list[float]],
    whole: dict[str, list[float]],
) -> None:
    bandwidth = measure.bandwidth_ceiling(work.device)
    table = 0 if options.modern else work.context * work.width  # of positions: a token reads one row
    read = sum(p.numel() for p in model.parameters()) - table
    print(f"machine  {measure.machine(work.device)}; {measure.versions('torch', 'transformers')}")
    print(f"work     {read / 1e6:.0f}M weights a token, {options.batch} rows, {options.precision}")
    print(f"ceiling  {bandwidth / 1e9:.1f} GB/s of reading memory")
    rows, figures = [], {}
    theirs = [all_ - one for all_, one in zip(whole["transformers"], first["transformers"], strict=True)]
    for name in whole:
        behind = [all_ - one for all_, one in zip(whole[name], first[name], strict=True)]
        seconds = statistics.median(behind) / (options.new - 1)
        width = _bytes_of_a_weight(name, work.dtype)
        limit = bandwidth / (read * width)
        rows.append(
            [
                name,
                f"{statistics.median(first[name]) * 1e3:.0f} ms",
                f"{options.batch / seconds:.1f}",
                f"{measure.median_ratio(theirs, behind):.2f}",
                f"{1 / seconds / limit:.0%}",
            ]
        )
        figures[name] = {"first": first[name], "whole": whole[name], "tokens_per_second": options.batch / seconds}
    measure.show(rows, ["", "first token", "tokens/s", "times transformers", "of the bandwidth"])
    measure.keep(options.json, {"options": vars(options), "bandwidth": bandwidth, "methods": figures})


def _bytes_of_a_weight(name: str, dtype: torch.dtype) -> float:
    in_name = {"int8": 1, "Q8_0": 34 / 32, "float16": 2, "F16": 2, "F32": 4}
    return next((size for each, size in in_name.items() if each in name), dtype.itemsize)


if __name__ == "__main__":
    main()
