"""
A page to try a model in the browser: `python -m generation_mini.demo --model runs/NAME`.

The text appears as it is written, each character in the colour of how unsure the model was before it, or how much it
was surprised by what it then drew; pointing at a character shows the bits.
"""

import html
import math
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
import torch
from entry_points_mini import ArgumentParser, Settings, one_sentence_errors, option, quiet_libraries
from files_mini import display_name, find_checkpoint
from modeling_mini.loading.checkpoints import load_model
from torch.nn import functional as F
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .arguments import GenerationArguments
from .text_generation import IncrementalDetokenizer, encode_prompt, write_on

MEASURES = ("entropy", "surprise")
SECONDS_BETWEEN_VIEWS = 0.05
STYLE = """
.text { white-space: pre-wrap; font-family: ui-monospace, monospace; line-height: 1.7; overflow-wrap: anywhere }
.text .prompt { opacity: .6 }
.scale { display: inline-block; width: 12em; height: .8em; margin: 0 .5em;
         background: linear-gradient(to right, rgba(220, 60, 20, 0), rgba(220, 60, 20, .85)) }
"""


@dataclass
class DemoArguments(Settings):
    """Which model, and where the page is."""

    model: str | None = option(None, "run, checkpoint folder, or Hub name (default: the newest run under runs/)")
    adapter: str | None = option(None, "folder or Hub name of an adapter for the model (LoRA and its kin)")
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    port: int = option(7860, "port to listen at", at_least=1, at_most=65535)
    share: bool = option(False, "also make a public link through Gradio's servers, for a few days")
    trust_remote_code: bool = option(False, "run the code that a Hub repository of another model brings")


@dataclass
class Character:
    """A piece of text that is complete, and for each of its tokens the bits of entropy and of surprise."""

    text: str
    entropy: list[float]
    surprise: list[float]


class Watcher(LogitsProcessor, BaseStreamer):
    """
    Sees the logits before each token and then the token, and hands both on as characters. It changes nothing, and ends
    the text when nobody looks any more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.characters: queue.Queue[Character | str | Exception | None] = queue.Queue()
        self.is_left = False
        self._text = IncrementalDetokenizer(tokenizer)
        self._entropy: list[float] = []
        self._surprise: list[float] = []
        self._log_probabilities = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._log_probabilities = F.log_softmax(scores[0].float(), dim=-1)
        return scores

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1:  # the prompt
            return
        bits = self._log_probabilities / math.log(2)
        self._entropy.append(float(-(bits.exp2() * bits.clamp(min=-1e9)).sum()))
        self._surprise.append(-float(bits[value.item()]))
        self._hand_on(self._text.add(int(value)))

    def end(self) -> None:
        """Another window of the text may follow."""

    def finish(self) -> None:
        self._hand_on(self._text.finish())

    def _hand_on(self, piece: str) -> None:
        if piece:
            self.characters.put(Character(piece, self._entropy, self._surprise))
            self._entropy, self._surprise = [], []


class Leaving(StoppingCriteria):
    """Ends the text when the page has been left or Stop was pressed."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.watcher.is_left, dtype=torch.bool, device=input_ids.device)


def follow(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, arguments: GenerationArguments
) -> Iterator[list[Character | str]]:
    """
    Writes in a thread, and yields what is new every so often: characters, and sentences for the user.

    Raises:
        Exception: whatever the writing raised.
    """
    watcher = Watcher(tokenizer)
    ids = encode_prompt(tokenizer, prompt)

    def work() -> None:
        try:
            if arguments.seed is not None:
                torch.manual_seed(arguments.seed)
            write_on(
                model, tokenizer, [ids], arguments, watcher.characters.put, streamer=watcher,
                logits_processor=[watcher], stopping_criteria=[Leaving(watcher)],
            )  # fmt: skip
            watcher.finish()
            watcher.characters.put(None)
        except Exception as error:  # it belongs to whoever waits for the text
            watcher.characters.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        is_over = False
        while not is_over:
            new = [watcher.characters.get()]
            thread.join(SECONDS_BETWEEN_VIEWS)
            while not watcher.characters.empty():
                new.append(watcher.characters.get())
            for each in new:
                if isinstance(each, Exception):
                    raise each
            is_over = None in new
            yield [each for each in new if each is not None]
    finally:
        watcher.is_left = True
        thread.join()


def as_html(prompt: str, characters: list[Character], measure: str, vocab_size: int) -> str:
    """The text in colour: clear where the measure is 0, red where it is all that a vocabulary can hold."""
    most = math.log2(vocab_size)
    spans = [f'<span class="prompt">{html.escape(prompt)}</span>']
    for character in characters:
        bits = getattr(character, measure)
        share = min(1.0, sum(bits) / len(bits) / most) if bits else 0.0
        shown = ", ".join(
            f"entropy {entropy:.2f} and surprise {surprise:.2f} bits"
            for entropy, surprise in zip(character.entropy, character.surprise, strict=True)
        )
        spans.append(
            f'<span class="character" title="{shown}" style="background: rgba(220, 60, 20, {0.85 * share:.3f})">'
            f"{html.escape(character.text)}</span>"
        )
    scale = f'<div>0<span class="scale"></span>{most:.1f} bits of {measure}</div>'
    return f'<div class="text">{"".join(spans)}</div>{scale}'


def build_page(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
    """The page as Gradio `Blocks`, ready to `launch`."""
    import gradio

    def write(prompt: str, *settings: float | str) -> Iterator[str]:
        temperature, top_k, top_p, max_new_tokens, seed, measure = settings
        try:
            arguments = GenerationArguments(
                temperature=temperature, top_k=int(top_k), top_p=top_p, max_new_tokens=int(max_new_tokens),
                seed=int(seed) if seed is not None and seed >= 0 else None,
            )  # fmt: skip
            characters: list[Character] = []
            yield as_html(prompt, characters, measure, model.config.vocab_size)
            for new in follow(model, tokenizer, prompt, arguments):
                for each in new:
                    if isinstance(each, str):
                        gradio.Info(each)
                    else:
                        characters.append(each)
                yield as_html(prompt, characters, measure, model.config.vocab_size)
        except (ValueError, RuntimeError) as error:
            raise gradio.Error(" ".join(str(error).split())) from None

    config = model.generation_config
    with gradio.Blocks(title=f"Mini: {name}", analytics_enabled=False) as page:
        gradio.Markdown(f"### {name}\n{model.num_parameters():,} parameters, writes on from what you begin.")
        with gradio.Row():
            with gradio.Column(scale=3):
                prompt = gradio.Textbox(label="Prompt", lines=3, elem_id="prompt")
                with gradio.Row():
                    start = gradio.Button("Write", variant="primary", elem_id="write")
                    stop = gradio.Button("Stop", elem_id="stop")
                output = gradio.HTML(elem_id="output")
            with gradio.Column(scale=1):
                values = config.temperature or 1.0, config.top_k or 0, config.top_p or 1.0
                settings = [
                    gradio.Slider(0, 2, values[0], step=0.05, label="Temperature (0: always the likeliest)"),
                    gradio.Slider(0, 100, values[1], step=1, label="Top k (0: off)"),
                    gradio.Slider(0.05, 1, values[2], step=0.05, label="Top p"),
                    gradio.Slider(1, 2000, 300, step=1, label="Tokens", elem_id="tokens"),
                    gradio.Number(-1, label="Seed (-1: another text each time)", precision=0, elem_id="seed"),
                    gradio.Radio(list(MEASURES), value="entropy", label="Colour", elem_id="measure"),
                ]
        event = gradio.on([start.click, prompt.submit], write, [prompt, *settings], output, show_progress="hidden")
        stop.click(None, cancels=[event])
    return page


def main() -> None:
    with one_sentence_errors():
        (arguments,) = ArgumentParser(DemoArguments, description="A page to try a model.").parse(sys.argv[1:])
        try:
            import gradio
        except ImportError:
            raise ValueError("The page needs Gradio: pip install gradio.") from None
        quiet_libraries()
        model, tokenizer = load_model(
            arguments.model, adapter=arguments.adapter, trust_remote_code=arguments.trust_remote_code
        )
        page = build_page(model, tokenizer, display_name(find_checkpoint(arguments.adapter or arguments.model)))
        theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        page.launch(
            server_name=arguments.host, server_port=arguments.port, share=arguments.share, theme=theme, css=STYLE,
            show_error=True, footer_links=[],
        )  # fmt: skip


if __name__ == "__main__":
    main()
