"""hawqfx, run as the others are."""

from others import exchange

import hawqfx


def quantize(job: exchange.Job) -> exchange.Weights:
    elements = {name: job.model.get_parameter(name).numel() for name in job.weights}
    average = 8 * job.bytes / sum(elements.values())
    compiled = hawqfx.compile(job.model, f"weight_bits={average}", [job.inputs], **job.options)
    compiled.export(job.file)
    return {name: (compiled.plan.bits[name], count) for name, count in elements.items()}


if __name__ == "__main__":
    exchange.serve(quantize)
