"""
Stand-in for the generation tests, which are not in the source distribution: `ModelTesterMixin` asks for a base of this
name on every model that generates. Where `generate` can reach the same result in two ways, both are compared.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

NEW_TOKENS = 6
BEAMS = 3


class GenerationTesterMixin:
    suite_name = "generation (stand-in)"

    def _models_and_prompts(self) -> list[tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
        """Each generative class with a batch of prompts of one length; generation never ends early."""
        pairs = []
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None
            prompts = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["attention_mask"])}
            pairs.append((model, prompts))
        return pairs

    def _assert_same(self, one_way: dict[str, Any], other_way: dict[str, Any]) -> None:
        """The two sets of options give the same tokens, for every generative class."""
        for model, prompts in self._models_and_prompts():
            tokens = [
                model.generate(**{"max_new_tokens": NEW_TOKENS, "do_sample": False, **prompts, **options})
                for options in (one_way, other_way)
            ]
            self.assertEqual(tokens[0].shape[1], prompts["input_ids"].shape[1] + NEW_TOKENS)
            self.assertEqual(tokens[0].tolist(), tokens[1].tolist())

    def test_greedy_generate_takes_the_likeliest_token(self):
        for model, prompts in self._models_and_prompts():
            expected = prompts["input_ids"]
            with torch.no_grad():
                for _ in range(NEW_TOKENS):
                    likeliest = model(expected, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
                    expected = torch.cat((expected, likeliest), dim=1)
            tokens = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
            self.assertEqual(tokens.tolist(), expected.tolist())

    def test_generate_without_cache(self):
        self._assert_same({}, {"use_cache": False})

    def test_generate_with_static_cache(self):
        self._assert_same({}, {"cache_implementation": "static", "disable_compile": True})

    def test_beam_search_without_cache(self):
        self._assert_same({"num_beams": BEAMS}, {"num_beams": BEAMS, "use_cache": False})

    def test_generate_with_eager_attention(self):
        for model, prompts in self._models_and_prompts():
            expected = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
            model.set_attn_implementation("eager")
            tokens = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
            self.assertEqual(tokens.tolist(), expected.tolist())

    def test_generate_continues_from_a_cache(self):
        for model, prompts in self._models_and_prompts():
            expected = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
            cache = DynamicCache(config=model.config)
            some = model.generate(**prompts, max_new_tokens=2, do_sample=False, past_key_values=cache)
            tokens = model.generate(some, max_new_tokens=NEW_TOKENS - 2, do_sample=False, past_key_values=cache)
            self.assertEqual(tokens.tolist(), expected.tolist())

    def test_generate_with_left_padding(self):
        for model, prompts in self._models_and_prompts():
            expected = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
            padding = torch.zeros((prompts["input_ids"].shape[0], 3), dtype=torch.long)
            padded = {name: torch.cat((padding, tensor), dim=1) for name, tensor in prompts.items()}
            tokens = model.generate(**padded, max_new_tokens=NEW_TOKENS, do_sample=False)
            self.assertEqual(tokens[:, 3:].tolist(), expected.tolist())

    def test_generate_from_embeddings(self):
        for model, prompts in self._models_and_prompts():
            expected = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
            embeddings = model.get_input_embeddings()(prompts["input_ids"])
            tokens = model.generate(
                inputs_embeds=embeddings,
                attention_mask=prompts["attention_mask"],
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            self.assertEqual(tokens.tolist(), expected[:, prompts["input_ids"].shape[1] :].tolist())

    def test_assisted_generation(self):
        for model, prompts in self._models_and_prompts():
            prompt = {name: tensor[:1] for name, tensor in prompts.items()}
            expected = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
            assistant = type(model)(model.config).eval()
            tokens = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=assistant)
            self.assertEqual(tokens.tolist(), expected.tolist())

    def test_sampling_depends_on_the_seed_alone(self):
        for model, prompts in self._models_and_prompts():
            sampled = []
            for seed in (0, 0, 1):
                torch.manual_seed(seed)
                options = {"do_sample": True, "num_return_sequences": 2, "top_k": 50, "top_p": 0.9}
                sampled.append(model.generate(**prompts, max_new_tokens=NEW_TOKENS, **options).tolist())
            self.assertEqual(sampled[0], sampled[1])
            self.assertNotEqual(sampled[0], sampled[2])

    def test_generate_returns_what_it_is_asked_for(self):
        for model, prompts in self._models_and_prompts():
            model.set_attn_implementation("eager")
            output = model.generate(
                **prompts,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                output_attentions=True,
                output_hidden_states=True,
            )
            config, (batch, length) = model.config, prompts["input_ids"].shape
            for step in range(NEW_TOKENS):
                new = length if step == 0 else 1
                self.assertEqual(output.scores[step].shape, (batch, config.vocab_size))
                self.assertEqual(output.logits[step].shape, (batch, config.vocab_size))
                self.assertEqual(len(output.hidden_states[step]), config.num_hidden_layers + 1)
                self.assertEqual(output.hidden_states[step][-1].shape, (batch, new, config.hidden_size))
                self.assertEqual(len(output.attentions[step]), config.num_hidden_layers)
                shape = (batch, config.num_attention_heads, new, length + step)
                self.assertEqual(output.attentions[step][0].shape, shape)
