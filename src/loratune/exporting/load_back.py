"""Load an export back the way its users will: with transformers, or with llama.cpp."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loratune.data.prompts import render_prompts
from loratune.data.rows.conversation import Conversation
from loratune.data.rows.row import Origin
from loratune.model.arithmetic import float32_arithmetic
from loratune.model.gguf_config import gguf_config

if TYPE_CHECKING:
    from loratune.exporting.adapter_matrices import LowRank

RenderPrompt = Callable[[Sequence[dict[str, Any]]], str]
"""Renders a conversation as text, up to where the answer begins."""


class TransformersReader:
    """A folder or GGUF file loaded by transformers, with its adapter by PEFT.

    Args:
        folder: The folder with the model and its tokenizer.
        dtype: The type to load weights in; `auto`: as they are stored. Arithmetic is float32.
        device: The device to compute on.
        gguf_file: The name of a GGUF file in the folder; None for safetensors.
        adapter: A folder in PEFT's format with its own tokenizer and template.
        trust_remote_code: Whether Python files that come with the model may run.
        architecture: The transformers class that loads the folder; None lets transformers choose.
        render: Replaces the target's own template; the tokenizer then adds its usual special tokens.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | str,
        device: str = "cpu",
        gguf_file: str | None = None,
        adapter: Path | None = None,
        trust_remote_code: bool = False,
        architecture: str | None = None,
        render: RenderPrompt | None = None,
    ) -> None:
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from loratune.model.adapter.attach import load_adapter

        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        known: dict[str, Any] = {}
        if gguf_file is not None:
            options["gguf_file"] = gguf_file
            known["config"] = gguf_config(folder / gguf_file)
        loader: Any = AutoModelForCausalLM if architecture is None else getattr(transformers, architecture)
        model: Any = loader.from_pretrained(folder, dtype=dtype, **options, **known)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(adapter or folder, **({} if adapter else options))
        eos = model.generation_config.eos_token_id
        self._stops = eos if isinstance(eos, list) else [eos]
        if adapter is not None:
            model = load_adapter(model, Path(adapter))
        self._model = model.to(device).eval()
        self._rounds = self._model.dtype in (torch.float16, torch.bfloat16)
        self._arithmetic = ExitStack()
        self._render = render
        names = ["transformers", *(["peft"] if adapter else []), *(["gguf"] if gguf_file else [])]
        self.checked_with = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        if self._render is not None:
            ids: list[int] = self._tokenizer(self._render(messages))["input_ids"]
            return ids
        # `render_prompts` renders prompts of answers, so it needs one; its text does not matter.
        conversation = Conversation(
            messages=(*messages, {"role": "assistant", "content": "-"}),
            tools=tuple(tools) if tools else None,
            text=None,
            origin=Origin(file="held-out", line=1),
        )
        return render_prompts([conversation], self._tokenizer)[0].input_ids

    def replace_adapter(self, updates: Mapping[str, LowRank], why: str) -> None:
        """Overwrite the adapter's values with those read back from another file.

        Args:
            updates: Module → its update in the file.
            why: Why its own program does not load the file, for `checked_with`.
        """
        for module, update in updates.items():
            layer = self._model.get_base_model().get_submodule(module)
            layer.lora_A["default"].weight.data = update.a.to(layer.lora_A["default"].weight).contiguous()
            layer.lora_B["default"].weight.data = update.b.to(layer.lora_B["default"].weight).contiguous()
            layer.scaling["default"] = update.scale
        self.checked_with += f" ({why})"

    @torch.no_grad()
    def logits(self, input_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([list(input_ids)], device=self._model.device)
        if self._rounds:  # the first time as it will be served, since float16 can overflow where float32 does not
            output: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
            if not bool(output.isfinite().all()):
                return output[torch.tensor(positions, device=output.device)].float()
            self._rounds = False
            self._arithmetic.enter_context(float32_arithmetic(self._model))
        output = self._model(input_ids=ids, use_cache=False).logits[0]
        return output[torch.tensor(positions, device=output.device)].float()

    def ends_with(self, token_id: int) -> bool:
        return token_id in self._stops


class LlamaCppReader:
    """A GGUF file loaded by llama.cpp, through llama-cpp-python.

    Args:
        model: The GGUF file of the model.
        adapter: A GGUF LoRA file; None for the model alone.
        num_tokens: The length of the longest prompt and answer together, in tokens.
        render: Replaces the file's own template; llama.cpp then adds its usual special tokens.
    """

    def __init__(
        self, model: Path, *, adapter: Path | None = None, num_tokens: int, render: RenderPrompt | None = None
    ) -> None:
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self._library = llama_cpp
        self._render = render
        self._generated, self._seconds = 0, 0.0
        self._llama = llama_cpp.Llama(
            model_path=str(model),
            lora_path=str(adapter) if adapter is not None else None,
            n_ctx=num_tokens + 8,
            n_batch=num_tokens + 8,
            logits_all=True,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            verbose=False,
        )
        template = self._llama.metadata.get("tokenizer.chat_template")
        self._format = (
            Jinja2ChatFormatter(
                template=template,
                eos_token=self._piece(self._llama.token_eos()),
                bos_token=self._piece(self._llama.token_bos()),
            )
            if template
            else None
        )
        self.checked_with = f"llama.cpp in llama-cpp-python {importlib.metadata.version('llama_cpp_python')}"

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        ids: list[int]
        if self._render is not None:
            ids = self._llama.tokenize(self._render(messages).encode(), add_bos=True, special=True)
            return ids
        if self._format is None:
            return []
        text = self._format(messages=list(messages), tools=list(tools) if tools else None).prompt
        ids = self._llama.tokenize(text.encode(), add_bos=False, special=True)
        return ids

    def logits(self, input_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        self._llama.reset()
        self._llama.eval(list(input_ids))
        return torch.from_numpy(np.array(self._llama.scores[list(positions)], dtype=np.float32))

    def ends_with(self, token_id: int) -> bool:
        vocabulary = self._library.llama_model_get_vocab(self._llama.model)
        return bool(self._library.llama_vocab_is_eog(vocabulary, token_id))

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Answer greedily. The token that ends the answer is left out."""
        self._llama.reset()
        answer: list[int] = []
        begin = time.perf_counter()
        for number, token in enumerate(self._llama.generate(list(prompt_ids), temp=0.0, repeat_penalty=1.0)):
            if number == 0:
                begin = time.perf_counter()  # the prompt is read, and the first token with it
            if self.ends_with(token) or len(answer) == max_new_tokens:
                self._generated += number
                break
            answer.append(token)
        self._seconds += time.perf_counter() - begin
        return answer

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of all answers so far, without reading prompts; None without any."""
        return self._generated / self._seconds if self._generated else None

    def close(self) -> None:
        """Free the memory."""
        self._llama.close()

    def _piece(self, token: int) -> str:
        if token < 0:
            return ""
        text: str = self._llama._model.token_get_text(token)
        return text


def has_llama_cpp() -> bool:
    """Return whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None
