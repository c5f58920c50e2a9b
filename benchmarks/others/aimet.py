"""AIMET: AdaRound of weights whose bits are given, and ranges of activations by its simulation."""

import torch
from others import exchange
from torch import nn

exchange.prepare_torchvision()  # before the imports that reach it

import aimet_torch.onnx  # noqa: E402
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters  # noqa: E402
from aimet_torch.batch_norm_fold import fold_all_batch_norms  # noqa: E402
from aimet_torch.common.defs import QuantScheme  # noqa: E402
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config  # noqa: E402
from aimet_torch.model_preparer import prepare_model  # noqa: E402
from aimet_torch.quantsim import QuantizationSimModel  # noqa: E402

BATCH = 32
DEFAULT_BITS = 4  # the fewest that it takes for a whole network; single weights may have fewer
RANGES = QuantScheme.post_training_tf_enhanced  # of the least squared error


def quantize(job: exchange.Job) -> exchange.Weights:
    torch.manual_seed(0)
    batches = job.inputs.split(BATCH)
    model = prepare_model(job.model)
    fold_all_batch_norms(model, tuple(batches[0].shape))
    layers = {f"{name}.weight": layer for name, layer in model.named_modules()}
    given = job.options["bits"]  # of each weight, or of all
    bits = given if isinstance(given, dict) else dict.fromkeys(job.weights, given)
    config = get_path_for_per_channel_config()
    rounded = Adaround.apply_adaround(
        model, batches[0],
        AdaroundParameters(batches, len(batches), default_num_iterations=job.options["steps"]),
        str(job.file.parent), "rounded", DEFAULT_BITS,
        param_bw_override_list=[(layers[name], bits[name]) for name in job.weights],
        default_quant_scheme=RANGES, default_config_file=config,
    )  # fmt: skip
    simulation = QuantizationSimModel(
        rounded, batches[0], RANGES, default_param_bw=DEFAULT_BITS, default_output_bw=8, config_file=config
    )
    simulation.set_and_freeze_param_encodings(str(job.file.parent / "rounded.encodings"))
    simulation.compute_encodings(lambda network: [network(batch) for batch in batches])
    weights = _rounded_in_place(simulation)
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    aimet_torch.onnx.export(
        simulation, batches[0], str(job.file), input_names=["input"], output_names=["output"], dynamic_axes=axes,
        dynamo=False, export_int32_bias=False,
    )  # fmt: skip
    return weights


@torch.no_grad()
def _rounded_in_place(simulation: QuantizationSimModel) -> exchange.Weights:
    """Weights become the floats that their codes stand for, since ONNX has no integers of most widths."""
    weights = {}
    for name, layer in simulation.named_qmodules():
        if "weight" in layer.param_quantizers and isinstance(layer, nn.Conv2d | nn.Linear):
            quantizer = layer.param_quantizers["weight"]
            layer.weight.copy_(quantizer(layer.weight))
            layer.param_quantizers["weight"] = None
            weights[f"{name}.weight"] = (quantizer.bitwidth, layer.weight.numel())
    return weights


if __name__ == "__main__":
    exchange.serve(quantize)
