"""Sony's Model Compression Toolkit: mixed precision within bytes of weights, and its gradient step if epochs are asked
for."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from others import exchange

exchange.prepare_torchvision()  # before the imports that reach it

import model_compression_toolkit as mct  # noqa: E402
from mct_quantizers import PytorchQuantizationWrapper, QuantizationMethod  # noqa: E402
from model_compression_toolkit.target_platform_capabilities import constants  # noqa: E402
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc  # noqa: E402

BATCH = 32


def quantize(job: exchange.Job) -> exchange.Weights:
    def batches() -> Iterator[list[Any]]:
        for batch in job.inputs.split(BATCH):
            yield [batch.numpy()]

    settings: dict[str, Any] = {
        "target_resource_utilization": mct.core.ResourceUtilization(weights_memory=job.bytes),
        "core_config": mct.core.CoreConfig(
            mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=job.options["images"])
        ),
        "target_platform_capabilities": capabilities(job.options["widths"]),
    }
    torch.manual_seed(0)
    if epochs := job.options.get("epochs"):
        learning = mct.gptq.get_pytorch_gptq_config(
            n_epochs=epochs, use_hessian_sample_attention=job.options["attention"]
        )
        quantized, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            job.model, batches, gptq_config=learning, **settings
        )
    else:
        quantized, _ = mct.ptq.pytorch_post_training_quantization(job.model, batches, **settings)
    weights = {
        name: (quantizer.num_bits, layer.get_quantized_weights()[kind].numel())
        for name, layer in quantized.named_modules()
        if isinstance(layer, PytorchQuantizationWrapper)
        for kind, quantizer in layer.weights_quantizers.items()
    }
    torch.onnx.export = partial(torch.onnx.export, dynamo=False)  # its exporter was written for this one
    mct.exporter.pytorch_export_model(
        quantized, str(job.file), batches, quantization_format=mct.exporter.QuantizationFormat.FAKELY_QUANT
    )
    return weights


def capabilities(widths: list[int]) -> Any:
    """Its own description of a target, with these widths, and activations with any scale and zero-point in place of
    powers of two."""
    layer, _, other = tpc.get_op_quantization_configs()
    layer, other = (
        each.clone_and_edit(activation_quantization_method=QuantizationMethod.UNIFORM) for each in (layer, other)
    )
    mixed = [
        layer.clone_and_edit(attr_to_edit={constants.KERNEL_ATTR: {constants.WEIGHTS_N_BITS: bits}})
        for bits in sorted(widths, reverse=True)
    ]
    return tpc.generate_tpc(default_config=other, base_config=layer, mixed_precision_cfg_list=mixed, name="peers")


if __name__ == "__main__":
    exchange.serve(quantize)
