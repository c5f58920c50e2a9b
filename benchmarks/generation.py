"""Which causal language models generate: those of tiny_transformers.py, compiled with tokens="causal".

    python benchmarks/generation.py [--quick] [--check] [--only NAME ...]

Each is compiled to 7 bits per weight and exported.  "float" is the largest difference of the captured decoder's logits
from those of transformers, of the largest; "equal" the share of greedy tokens, eight for each of two prompts, that
onnxruntime generates from the file one by one (examples/generate.py) as the fake-quantized graph does from the whole
text each time.  --quick: four networks.
"""

import importlib.util
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Claims, console, each_network, parser
from rich.table import Table
from tiny_transformers import TINY, Tiny
from torch import Tensor

import hawqfx
from hawqfx.errors import HawqfxError
from hawqfx.frontend.decoders import MASK, TOKENS
from hawqfx.runtime import ort

QUICK = ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "Gemma3ForCausalLM")
CAUSAL = tuple(tiny.name for tiny in TINY if tiny.name.endswith(("ForCausalLM", "LMHeadModel")))
NEW, PROMPT, FLOAT = 8, 7, 1e-4  # float32 sums in another order, through a network
EXAMPLE = Path(__file__).parents[1] / "examples" / "generate.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("generate", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def examine(tiny: Tiny) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found = _generated(tiny)
    except HawqfxError as error:
        found = {"outcome": "refused", "message": " ".join(str(error).split())[:200]}
    except Exception as error:  # what the benchmark is to find
        found = {"outcome": "crashed", "message": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
    return found | {"seconds": round(time.perf_counter() - start, 1)}


@torch.no_grad()
def _generated(tiny: Tiny) -> dict[str, Any]:
    model, texts = tiny.build(), torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        compiled = hawqfx.compile(model, "weight_bits=7", texts, tokens="causal", sensitivity="mse", rounding="nearest")
    prompts, generate = texts[:2, :PROMPT], example()
    with tempfile.TemporaryDirectory() as folder:
        compiled.export(Path(folder) / "model.onnx")
        session = ort.session(Path(folder) / "model.onnx")
        tokens = list(generate.greedy(session, prompts.numpy(), np.ones_like(prompts.numpy()), NEW))
        empty = {name: torch.from_numpy(value) for name, value in generate.empty_past(session, 2).items()}

    def logits(network: Any, seen: Tensor) -> Tensor:
        return network({TOKENS: seen, MASK: torch.ones_like(seen), **empty})["logits"]

    seen = prompts
    for _ in range(NEW):
        last = logits(lambda inputs: compiled.model(**inputs), seen)[:, -1]
        seen = torch.cat([seen, last.argmax(-1)[:, None]], 1)
    captured = logits(lambda inputs: compiled.session.measured.run((), inputs), texts[:2])
    wanted = model(input_ids=texts[:2]).logits
    difference = float((captured - wanted).abs().max() / wanted.abs().max())
    equal = float((seen[:, PROMPT:].numpy() == np.stack(tokens, 1)).mean())
    holds = difference < FLOAT and equal == 1.0
    return {"outcome": "generates" if holds else "differs", "float": difference, "equal": equal}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", nargs="+", choices=CAUSAL, default=list(CAUSAL))
    args = arguments.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tiny = {each.name: each for each in TINY}
    if args.quick:
        results = {name: examine(tiny[name]) for name in QUICK}
    else:
        results = each_network("generation", args.only, lambda name: examine(tiny[name]))
    table = Table("network", "outcome", "float", "equal", "s", "message")
    for name, found in results.items():
        numbers = [f"{found['float']:.0e}", f"{found['equal']:.0%}"] if "equal" in found else ["-", "-"]
        table.add_row(name, found["outcome"], *numbers, f"{found['seconds']:.0f}", found.get("message", "")[:60])
    console.print(table)
    outcomes = [found["outcome"] for found in results.values()]
    claims = Claims()
    for bad in ("differs", "crashed"):
        claims.add(f"none {bad}", bad not in outcomes, f"{outcomes.count('generates')} of {len(outcomes)} generate")
    args.quick = True  # each_network has written the results
    claims.finish("generation", args, {})


if __name__ == "__main__":
    main()
