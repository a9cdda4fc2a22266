"""Stand-in for the list that `ConfigTester` sets and reads back: one value that is not the default for each field."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["MiniForCausalLM"],
    "id2label": {0: "left", 1: "right", 2: "neither"},
    "label2id": {"left": 0, "right": 1, "neither": 2},
    "problem_type": "regression",
}
