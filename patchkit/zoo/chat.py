"""``zoo/vlm`` in use: its ``LlavaProcessor``, whose tokenizer has one token a word and is built in code, and its pair.

Importing this module imports no transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patchkit.media import as_tensor
from patchkit.zoo.text import CHAT_WORDS, WORDS
from patchkit.zoo.world import SIZE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

PATCH = 8  # pixels of a visual token, both ways
IMAGE_TOKENS = (SIZE // PATCH) ** 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ANSWER_TOKENS = 24  # the longest caption takes 15 with its end
SYSTEM = "answer the questions about the picture."

# As LLaVA 1.5's: an image stands where its content part stands, a turn of the assistant ends with </s>.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '"
    + SYSTEM
    + " ' }}{% endif %}"
    + """{% for message in messages -%}
{%- if message['role'] == 'user' %}{{ 'USER: ' }}{% endif -%}
{%- if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif -%}
{%- if message['content'] is string %}{{ message['content'] + ' ' }}
{%- else %}{% for part in message['content'] -%}
{%- if part['type'] == 'image' %}{{ '<image>\\n' }}{% elif part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif -%}
{%- endfor %}{% endif -%}
{%- if message['role'] == 'assistant' %}{{ '</s>' }}{% endif -%}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and punctuation marks; it puts ``<s>`` first, and unknown words become ``<unk>``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(dict.fromkeys((*SPECIAL, *WORDS, *CHAT_WORDS)))}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def chat_processor() -> LlavaProcessor:
    """The processor of ``zoo/vlm``: pictures of any size become 64x64, each is 64 tokens."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=chat_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops
        chat_template=TEMPLATE,
        image_token="<image>",
    )


class VisionLanguage(NamedTuple):
    """What ``patchkit.zoo.load("vlm")`` returns: ``model, processor = zoo.load("vlm")``.

    Recipes are applied to the model. Both are used as those of any LLaVA; :meth:`ask` is a short way to do so.
    """

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor

    def prompt(self, question: str, pictures: int = 1) -> str:
        """The text that asks ``question`` about so many pictures."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        messages: Any = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def ask(self, question: str, *pictures: Any, **call: Any) -> str:
        """The answer to a question about one or several pictures (anything that ``media.as_tensor`` takes)."""
        return self.answers([question], [pictures], **call)[0]

    def answers(self, questions: Sequence[str], pictures: Sequence[Sequence[Any]], **call: Any) -> list[str]:
        """Answers to ``questions``, each about its own pictures, in one batch.

        Args:
            questions: B questions.
            pictures: for each the pictures that stand before it.
            call: arguments of ``generate``.
        """
        import torch

        frames = [(as_tensor(p)[0] * 255).round().to(torch.uint8) for shown in pictures for p in shown]
        texts = [self.prompt(q, len(shown)) for q, shown in zip(questions, pictures, strict=True)]
        given: Any = self.processor(text=texts, images=frames or None, padding=True, return_tensors="pt")
        given = given.to(self.model.device, self.model.dtype)
        model: Any = self.model
        with torch.no_grad():
            tokens = model.generate(**given, **{"max_new_tokens": ANSWER_TOKENS, "do_sample": False, **call})
        told = tokens[:, given["input_ids"].shape[1] :]
        return [str(t) for t in self.processor.batch_decode(told, skip_special_tokens=True)]


def load_chat(folder: Path, torch_dtype: Any = None) -> VisionLanguage:
    """Load a vision-language model of the zoo's making from any folder, offline."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    options: Any = {"local_files_only": True}
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch_dtype or torch.float32, **options)
    return VisionLanguage(model.eval(), LlavaProcessor.from_pretrained(folder, **options))
