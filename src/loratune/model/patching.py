"""The one place that replaces the class of another library's object.

A few objects that PEFT, transformers and torchao create need another `forward` or another answer. Wrapping them would
change the names of their parameters, and so the saved files; patching the library's class would change every model of
the process. Replacing the class of one instance by a subclass of it does neither: parameters, hooks, names and
`isinstance` stay as they are.

After an upgrade of one of these libraries, read this list (and `data/masking/template_sandbox`, which does the same to
the Jinja environment of a chat template):

    object of                              new class                             relies on
    peft.tuners.lora.layer.Linear          adapter.attach.fast_class             base_layer, lora_A, lora_B, scaling,
      and the layers on packed weights                                           lora_dropout, merged, active_adapters
    peft TrainableTokensLayer              adapter.new_tokens.FastRows           token_indices, trainable_tokens_delta
    modules in PEFT's ModulesToSaveWrapper adapter.modules_to_save (Float32…)    modules_to_save["default"]
    torch.nn.Linear with a torchao weight  kernels.packed_linear.PackedLinear    weight, bias
    transformers TorchAoHfQuantizer        quantization.torchao                  is_trainable

`training/layers.prepare_layers` replaces a call, not a class: `_compiled_call_impl` of the decoder layers.
"""

from __future__ import annotations

from typing import Any


def replace_class(instance: Any, subclass: type) -> None:
    """Replace the class of one object by a subclass of it that adds no state of its own."""
    assert issubclass(subclass, type(instance)), f"{subclass.__name__} is not a subclass of {type(instance).__name__}"
    instance.__class__ = subclass
