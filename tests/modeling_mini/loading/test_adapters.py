"""Adapters of the real peft: every way to load one gives the same model, and one that does not fit is refused."""

import json
import shutil
import warnings
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM, fast_generation
from modeling_mini.export import quantized
from modeling_mini.loading.checkpoints import load_model
from safetensors.torch import load_file, save_file
from tokenization import ByteTokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

IDS = torch.randint(8, 264, (2, 20), generator=torch.Generator().manual_seed(1))
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
MODULES = ["q_proj", "down_proj"]


def lora(**settings: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": MODULES, "r": 4, **settings})


CONFIGS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "dora of all": lora(use_dora=True, target_modules="all-linear"),
    "lora, norm saved": lora(modules_to_save=["norm"]),
    "lora, tied embedding saved": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "lora, trained tokens": lora(trainable_token_indices=[8, 9]),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=MODULES, r=4),
}
PROMPT_LEARNING = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def save_base(folder: Path, seed: int = 3, **fields: object) -> Path:
    torch.manual_seed(seed)
    config = MiniConfig.preset("tiny", **{"num_hidden_layers": 2, "initializer_range": 0.1, **SHAPE, **fields})
    MiniForCausalLM(config).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def save_adapter(folder: Path, base: Path, config: peft.PeftConfig, seed: int = 0) -> Path:
    """An adapter with random weights. Nothing of it stays as it began, as nothing would in training."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.data = 1.5 * weight.data if "magnitude" in name else torch.randn_like(weight) * 0.3
        adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    configs = {**CONFIGS, **PROMPT_LEARNING}
    return {name: save_adapter(root / name, base, config) for name, config in configs.items()}


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def write(model: PreTrainedModel, path: str, **settings: object) -> torch.Tensor:
    """The tokens of one greedy call, by "fast" or "loop", and no other way."""
    with mock.patch.object(fast_generation, "decode", wraps=fast_generation.decode) as fast:
        text = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=20, do_sample=False, pad_token_id=0,
            eos_token_id=None, **settings,
        )  # fmt: skip
    assert fast.called == (path == "fast")
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_to_load_an_adapter_gives_the_same(name: str, base: Path, adapters: dict[str, Path]) -> None:
    folder = adapters[name]
    reference = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    expected = logits(reference)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - expected).abs().max() > 0.01
    plain.load_adapter(folder)
    assert torch.equal(logits(plain), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    # While an adapter stands beside the weights, transformers' loop writes; merged, the fast path.
    tokens = write(reference, "loop")
    assert torch.equal(write(plain, "loop"), tokens)
    merged, _ = load_model(str(folder))
    assert type(merged) is MiniForCausalLM
    head = merged.lm_head
    assert (head.out_features, head.in_features) == head.weight.shape, "another adapter may come on top"
    assert (logits(merged) - expected).abs().max() < 5e-5
    assert torch.equal(write(merged, "fast"), tokens)
    assert torch.equal(write(merged, "loop", fast_decoding=False), tokens)
    unloaded = reference.merge_and_unload()
    assert torch.equal(logits(unloaded), logits(merged)) and torch.equal(write(unloaded, "fast"), tokens)


@pytest.mark.slow
def test_an_adapter_answers_in_its_own_chat_template(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(adapters["lora"], tmp_path / "adapter")
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}>{% endfor %}"
    tokenizer.save_pretrained(folder)
    _, loaded = load_model(str(base), str(folder))
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a>"


def test_the_configuration_of_an_adapter_is_read_once(base: Path, adapters: dict[str, Path]) -> None:
    """On the Hub, each time would be a request."""
    read = peft.PeftConfig.from_pretrained
    for model, adapter in ((None, adapters["lora"]), (base, adapters["lora"]), (adapters["lora"], None)):
        with mock.patch.object(peft.PeftConfig, "from_pretrained", side_effect=read) as reading:
            load_model(*(None if each is None else str(each) for each in (model, adapter)))
        assert reading.call_count == 1, (model, adapter)


@pytest.mark.slow
def test_dora_by_the_code_of_a_checkpoint(base: Path, adapters: dict[str, Path]) -> None:
    remote = get_class_from_dynamic_module("modeling_mini.MiniForCausalLM", base).from_pretrained(base)
    assert not isinstance(remote, MiniForCausalLM)
    remote.load_adapter(adapters["dora"])
    assert torch.equal(logits(remote), logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapters["dora"])))


def test_dora_from_tensors(base: Path, adapters: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = load_file(adapters["dora"] / "adapter_model.safetensors")
    model.load_adapter(peft_config=peft.PeftConfig.from_pretrained(adapters["dora"]), adapter_state_dict=tensors)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(adapters["dora"])))


@pytest.mark.slow
def test_several_adapters_in_one_model(base: Path, adapters: dict[str, Path]) -> None:
    expected = {name: logits(AutoModelForCausalLM.from_pretrained(adapters[name])) for name in ("lora", "dora")}
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(model)
    for name in expected:
        model.load_adapter(adapters[name], adapter_name=name)
    for name in ("lora", "dora", "lora"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        write(model, "loop")
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.delete_adapter("lora")
    model.set_adapter("dora")
    assert torch.equal(logits(model), expected["dora"])


@pytest.mark.parametrize("name", PROMPT_LEARNING)
def test_learned_prompts_are_written_with_by_the_loop(name: str, adapters: dict[str, Path]) -> None:
    """They reach the model through its inputs, which the fast path would prepare without them."""
    model, _ = load_model(str(adapters[name]))
    expected = peft.AutoPeftModelForCausalLM.from_pretrained(adapters[name])
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(write(model, "loop"), write(expected, "loop", fast_decoding=False))
    write(model.get_base_model(), "fast")  # and the base alone as before


def test_an_adapter_of_a_tied_embedding_is_not_merged(base: Path, tmp_path: Path) -> None:
    """Merged, what the embedding has learned would be in the head as well."""
    folder = save_adapter(tmp_path, base, lora(target_modules=["embed_tokens", "q_proj"]))
    model, _ = load_model(str(folder))
    assert isinstance(model, peft.PeftModel)
    assert torch.equal(logits(model), logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder)))
    with pytest.raises(ValueError, match="cannot be merged"):
        quantized.run([str(folder), str(tmp_path / "out"), "--load_in_8bit"])


def test_pipeline_on_an_adapter_folder(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(adapters["lora"], tmp_path / "adapter")
    ByteTokenizer().save_pretrained(folder)
    settings = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
    texts = [pipeline("text-generation", model=str(place))("abc", **settings) for place in (folder, base)]
    model, tokenizer = load_model(str(folder))
    output = model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=10, do_sample=False)
    assert texts[0] != texts[1]
    assert texts[0] == [{"generated_text": tokenizer.decode(output[0, 4:], skip_special_tokens=True)}]


@pytest.mark.slow
def test_an_adapter_beside_quantized_weights_and_merged_into_them(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    exact = logits(load_model(str(adapters["lora"]))[0])

    def distance(model: PreTrainedModel) -> float:
        return ((logits(model) - exact).norm() / exact.norm()).item()

    beside, _ = load_model(str(base), str(adapters["lora"]), quantization="8bit")
    assert isinstance(beside, peft.PeftModel) and distance(beside) < 0.1
    write(beside, "loop")
    quantized.run([str(adapters["lora"]), str(tmp_path / "after"), "--load_in_8bit"])
    after, _ = load_model(str(tmp_path / "after"))
    assert type(after) is MiniForCausalLM and distance(after) < 0.1
    quantized.run([str(base), str(tmp_path / "base"), "--load_in_8bit"])
    arguments = [str(tmp_path / "base"), str(tmp_path / "into"), "--adapter", str(adapters["lora"])]
    with pytest.raises(ValueError, match=r"is quantized already\. An adapter merged into it is rounded"):
        quantized.run(arguments)
    quantized.run([*arguments, "--merge_quantized"])
    into, _ = load_model(str(tmp_path / "into"))
    assert type(into) is MiniForCausalLM and distance(into) < 0.1
    assert (tmp_path / "into" / "README.md").read_text().count("## Quantized") == 1


def test_dora_over_int8_is_refused_before_its_second_forward_pass_fails(base: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"does not fit .*no DoRA over weights in INT8 on a CPU: take INT4"):
        load_model(str(base), str(adapters["dora"]), quantization="8bit")
    model, _ = load_model(str(base), quantization="8bit")
    with pytest.raises(ValueError, match="no DoRA over weights in INT8 on a CPU"):
        model.load_adapter(adapters["dora"])
    beside, _ = load_model(str(base), str(adapters["dora"]), quantization="4bit")
    assert torch.equal(logits(beside), logits(beside))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"hidden_size": 128}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"seed": 4}]
)
def test_an_adapter_of_another_base_names_both(
    fields: dict[str, int], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    other, adapter = save_base(tmp_path, **fields), adapters["lora"]
    misfit = f"The adapter {str(adapter)!r}, which was trained on {str(base)!r}, does not fit {str(other)!r}: "
    with pytest.raises(ValueError) as caught:
        load_model(str(other), str(adapter))
    assert str(caught.value).startswith(misfit)
    if "seed" in fields:  # of one shape: transformers cannot tell
        return
    model = AutoModelForCausalLM.from_pretrained(other)
    before = logits(model)
    with pytest.raises(ValueError) as caught:
        model.load_adapter(str(adapter))
    assert str(caught.value).startswith(misfit)
    assert torch.equal(logits(model), before) and not getattr(model, "peft_config", None)
    if fields != {"hidden_size": 128}:  # which torch refuses
        with pytest.raises(ValueError, match=f"weights of the adapter are in its file alone or in '{other}'"):
            peft.PeftModel.from_pretrained(model, adapter)


def test_parts_of_adapters_are_refused_by_peft_and_whole_ones_are_not(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """By any name, and beside others that have more layers or fewer: see also the test of every way above."""
    model = AutoModelForCausalLM.from_pretrained(base)
    beside = peft.PeftModel.from_pretrained(model, adapters["lora"], adapter_name="first")
    for name in ("dora of all", "rslora", "lora, norm saved"):
        beside.load_adapter(adapters[name], name.replace(" ", "_"))
        beside.set_adapter(name.replace(" ", "_"))
        assert torch.equal(logits(beside), logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapters[name])))
    model = AutoModelForCausalLM.from_pretrained(base)
    part = shutil.copytree(adapters["lora"], tmp_path / "part")
    weights = part / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(weights).items() if "layers.1" not in key}, weights)
    with pytest.raises(ValueError, match=r"4 weights of the adapter .* first model\.layers\.1\.mlp\.down_proj\.lora_A"):
        peft.PeftModel.from_pretrained(model, part)


def test_a_copy_of_the_base_is_the_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    model, _ = load_model(str(copy), str(adapters["lora"]), dtype=torch.bfloat16)
    assert type(model) is MiniForCausalLM and model.dtype == torch.bfloat16


@pytest.fixture
def broken(adapters: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter to spoil."""
    return shutil.copytree(adapters["lora"], tmp_path / "broken")


def test_an_unknown_type_of_adapter(broken: Path) -> None:
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "MORA"}))
    with pytest.raises(ValueError, match=r"is of the type 'MORA', and peft knows .*LORA"):
        load_model(str(broken))


def test_damaged_weights_of_an_adapter(broken: Path, base: Path) -> None:
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"adapter.*are damaged or cut short"):
        load_model(str(broken))
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"adapter.*damaged or cut short"):
        model.load_adapter(str(broken))


def test_an_adapter_without_some_or_all_of_its_weights(broken: Path) -> None:
    weights = broken / "adapter_model.safetensors"
    tensors = load_file(weights)
    dropped = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, weights)
    with pytest.raises(ValueError, match=r"first model\.layers\.0\.mlp\.down_proj\.lora_A\."):
        load_model(str(broken))
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter '.*broken' has no weights: adapter_model\.safetensors is missing"):
        load_model(str(broken))


def test_an_adapter_whose_base_is_gone(broken: Path, base: Path) -> None:
    config = json.loads((broken / "adapter_config.json").read_text())
    moved = {**config, "base_model_name_or_path": f"{broken}/moved"}
    (broken / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(ValueError, match=r"The adapter '.*broken' lies on '.*moved', .* name it by --model and"):
        load_model(str(broken))
    assert type(load_model(str(base), str(broken))[0]) is MiniForCausalLM


def test_an_adapter_whose_configuration_is_damaged(broken: Path) -> None:
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"No adapter could be loaded from '.*broken'"):
        load_model(str(broken))


def test_an_adapter_with_a_rank_that_is_no_number(broken: Path) -> None:
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": "two"}))
    with pytest.raises(ValueError, match=r"The adapter '.*broken', which was trained on .*, does not fit"):
        load_model(str(broken))


def test_an_adapter_whose_generation_settings_are_damaged(broken: Path) -> None:
    (broken / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    model, _ = load_model(str(broken))
    assert model.generation_config.eos_token_id == [2, 7]
    (broken / "generation_config.json").write_text('{"eos_token_id": [2,')
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        load_model(str(broken))


def test_an_adapter_that_names_no_base(broken: Path, base: Path) -> None:
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model it belongs to: name that by --model"):
        load_model(str(broken))
    assert type(load_model(str(base), str(broken))[0]) is MiniForCausalLM


TWO_MORE = ["<x>", "<y>"]
# Of each: the settings of LoRA, and whether its file holds weights for added tokens where embedding and head are tied,
# and where they are not. peft writes none of the head where the embedding is a target, or the reverse.
OF_TOKENS: dict[str, tuple[dict[str, object], bool, bool]] = {
    "embedding saved": ({"modules_to_save": ["embed_tokens"]}, True, True),
    "embedding saved, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True, True),
    "head saved": ({"modules_to_save": ["lm_head"]}, True, True),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True, True),
    "tokens": ({"trainable_token_indices": [264, 265]}, True, True),
    "tokens of the embedding": ({"trainable_token_indices": {"embed_tokens": [264, 265]}}, True, True),
    "embedding adapted": ({"target_modules": ["q_proj", "embed_tokens"]}, True, False),
    "head adapted": ({"target_modules": ["q_proj", "lm_head"]}, True, False),
    "nothing of them": ({}, True, True),
}


def with_two_more_tokens(base: Path) -> MiniForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(266, mean_resizing=False)
    return model


def train_on_new_tokens(
    base: Path, folder: Path, save_embedding_layers: bool | str = "auto", **settings: object
) -> torch.Tensor:
    """Saves an adapter of a resized base with its tokenizer, and gives its logits for `NEW_IDS`."""
    adapted = peft.get_peft_model(with_two_more_tokens(base), lora(**{"target_modules": ["q_proj"], **settings}))
    optimizer = torch.optim.Adam([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.01)
    for _ in range(3):
        adapted(NEW_IDS, labels=NEW_IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(TWO_MORE)
    tokenizer.save_pretrained(folder)
    return logits(adapted, NEW_IDS)


NEW_IDS = IDS.clone()
NEW_IDS[:, 3], NEW_IDS[:, 9] = 264, 265


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", OF_TOKENS)
def test_adapters_of_a_model_with_added_tokens(name: str, is_tied: bool, tmp_path: Path) -> None:
    settings, holds_tied, holds_untied = OF_TOKENS[name]
    base, folder = save_base(tmp_path / "base", tie_word_embeddings=is_tied), tmp_path / "adapter"
    torch.manual_seed(0)
    expected = train_on_new_tokens(base, folder, **settings)
    if not (holds_tied if is_tied else holds_untied):
        with pytest.raises(ValueError, match="trained with 2 tokens more, and their weights are not in its file"):
            load_model(str(folder))
        return
    for model in (
        peft.PeftModel.from_pretrained(with_two_more_tokens(base), folder),
        peft.AutoPeftModelForCausalLM.from_pretrained(folder),
    ):
        assert torch.equal(logits(model, NEW_IDS), expected)
    model = with_two_more_tokens(base)
    model.load_adapter(str(folder))
    assert torch.equal(logits(model, NEW_IDS), expected)
    model, tokenizer = load_model(str(folder))
    assert (logits(model, NEW_IDS) - expected).abs().max() < 1e-5
    assert tokenizer("a<y>").input_ids == [1, ord("a") + 8, 265]
    if isinstance(model, MiniForCausalLM):  # merged, and as a folder it is still the same
        model.save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert (logits(merged, NEW_IDS) - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_where_the_vocabulary_alone_differs_it_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    sentence = "its vocabulary has 266 tokens, and that of the model 264; resize the model first, by resize_token"
    for name in ("embedding saved", "nothing of them", "embedding adapted", "head adapted"):
        folder = tmp_path / name
        train_on_new_tokens(base, folder, **OF_TOKENS[name][0])
        with pytest.raises(ValueError, match=sentence):
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        with pytest.raises(ValueError, match=f"'{folder}', which was trained on '{base}', does not .*: {sentence}"):
            AutoModelForCausalLM.from_pretrained(folder)
    train_on_new_tokens(base, tmp_path / "tokens", **OF_TOKENS["tokens"][0])
    with pytest.raises(ValueError, match=sentence):
        AutoModelForCausalLM.from_pretrained(base).load_adapter(str(tmp_path / "tokens"))
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(300, mean_resizing=False)
    larger.save_pretrained(tmp_path / "larger")
    ByteTokenizer().save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="its vocabulary has 266 tokens, and that of the model 300"):
        load_model(str(tmp_path / "larger"), str(tmp_path / "embedding saved"))


@pytest.mark.filterwarnings("ignore")
def test_weights_of_added_tokens_that_are_nowhere(tmp_path: Path) -> None:
    base, folder = save_base(tmp_path / "base"), tmp_path / "adapter"
    train_on_new_tokens(base, folder, save_embedding_layers=False)
    with pytest.raises(ValueError, match="trained with 2 tokens more, and their weights are not in its file; save it"):
        load_model(str(folder))
    torch.manual_seed(0)
    resized = with_two_more_tokens(base)
    resized.save_pretrained(tmp_path / "resized")
    ByteTokenizer().save_pretrained(tmp_path / "resized")
    torch.manual_seed(0)
    expected = train_on_new_tokens(base, folder, save_embedding_layers=False)
    model, tokenizer = load_model(str(tmp_path / "resized"), str(folder))
    assert (logits(model, NEW_IDS) - expected).abs().max() < 1e-5 and len(tokenizer) == 266


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "50KB"}])
def test_a_base_in_shards_is_told_from_another_as_one_file_is(
    shards: dict[str, str], adapters: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(own, **shards)
    ByteTokenizer().save_pretrained(own)
    assert (own / "model.safetensors").is_file() is not bool(shards)
    adapter = shutil.copytree(adapters["lora"], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(own)}))
    assert type(load_model(str(base), str(adapter))[0]) is MiniForCausalLM
    other = save_base(tmp_path / "other", seed=4)
    with pytest.raises(ValueError, match="the two models have other weights"):
        load_model(str(other), str(adapter))
