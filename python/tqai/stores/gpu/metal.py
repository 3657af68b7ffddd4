"""The text of a kernel for Metal."""

from __future__ import annotations

from tqai.stores.gpu.kernels import Kernel


def function(kernel: Kernel) -> str:
    """The kernel's text, arguments in the order of inputs and outputs; ``source`` comes before."""
    arguments = []
    for name, kind in kernel.inputs:
        space = "constant" if name in ("sizes", "soft_cap") else "device"
        arguments.append(f"const {space} {kind}* {name} [[buffer({len(arguments)})]]")
    for name in kernel.outputs:
        arguments.append(f"device float* {name} [[buffer({len(arguments)})]]")
    arguments += [f"{kind} {name} [[{name}]]" for kind, name in kernel.places]
    signature = ",\n    ".join(arguments)
    return f"[[kernel]] void {kernel.name}(\n    {signature}) {{\n{kernel.body}}}\n"
