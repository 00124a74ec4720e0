"""nanoGPT's ckpt.pt as a checkpoint of ours, of step 0: its model is parametrization="standard", structure="dense".

nanoGPT's GELU is the exact one, ours GPT-2's tanh form: they differ by less than 0.0005.
"""

# A block's modules, by nanoGPT's name and by ours; c_attn is q, k and v.
MODULES = {
    "ln_1": "attn_norm", "attn.c_proj": "attn.proj", "ln_2": "ffn_norm", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down",
}  # fmt: skip
EMBEDDINGS = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
GPT2_VOCABULARIES = (50257, 50304)  # GPT-2's, and rounded up


def is_from_nanogpt(saved):
    """Whether what torch.load gave is a checkpoint of nanoGPT."""
    return isinstance(saved, dict) and {"model", "model_args"} <= saved.keys() and "step" not in saved


def from_nanogpt(saved):
    """{"model": its tensors, "model_args": …} -> {"step": 0, "config", "model", "optimizer", "meta", …}, as checkpoint.load's"""
    args = saved["model_args"]
    config = dict(
        n_layer=args["n_layer"], n_head=args["n_head"], d_model=args["n_embd"], block_size=args["block_size"],
        vocab_size=args["vocab_size"], bias=args["bias"], dropout=args.get("dropout", 0.0), parametrization="standard",
        structure="dense",
    )  # fmt: skip
    model = {}
    for name, tensor in saved["model"].items():
        path, _, kind = (
            name.removeprefix("_orig_mod.").removeprefix("transformer.").rpartition(".")
        )  # …, weight or bias
        if path == "lm_head" or path in EMBEDDINGS:
            model[f"{EMBEDDINGS.get(path, path)}.{kind}"] = tensor
            continue
        _, layer, module = path.split(".", 2)  # of h.0.attn.c_attn
        if module == "attn.c_attn":
            for part, of_part in zip("qkv", tensor.chunk(3)):  # (3 C, C) or (3 C)
                model[f"blocks.{layer}.attn.{part}.{kind}"] = of_part
        elif module in MODULES:  # else the causal mask of versions without flash attention
            model[f"blocks.{layer}.{MODULES[module]}.{kind}"] = tensor
    tokenizer = "gpt2" if config["vocab_size"] in GPT2_VOCABULARIES else "nanoGPT's meta.pkl"
    return {
        "step": 0, "seconds": 0.0, "best_val_loss": float("inf"), "wandb_id": None, "config": config, "model": model,
        "optimizer": {}, "scaler": {}, "meta": {"tokenizer": tokenizer, "vocab_size": config["vocab_size"]},
    }  # fmt: skip
