"""Turn nanoGPT's ckpt.pt into a checkpoint of ours at step 0, with parametrization="standard" and structure="dense".

nanoGPT computes GELU exactly, we use GPT-2's tanh approximation: they differ by less than 0.0005.
"""

# The modules of a block: {nanoGPT's name: ours}. c_attn is missing: it is q, k and v in one.
MODULES = {
    "ln_1": "attn_norm", "attn.c_proj": "attn.proj", "ln_2": "ffn_norm", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down",
}  # fmt: skip
EMBEDDINGS = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
GPT2_VOCABULARIES = (50257, 50304)  # GPT-2's vocab_size, and that rounded up to a multiple of 64


def is_from_nanogpt(saved):
    """Whether what torch.load returned is a checkpoint of nanoGPT."""
    return isinstance(saved, dict) and {"model", "model_args"} <= saved.keys() and "step" not in saved


def from_nanogpt(saved):
    """{"model": {name: tensor}, "model_args": …} -> a dict as checkpoint.load returns it, with step 0 and no optimizer state."""
    args = saved["model_args"]
    config = dict(
        n_layer=args["n_layer"], n_head=args["n_head"], d_model=args["n_embd"], block_size=args["block_size"],
        vocab_size=args["vocab_size"], bias=args["bias"], dropout=args.get("dropout", 0.0), parametrization="standard",
        structure="dense",
    )  # fmt: skip
    model = {}
    for name, tensor in saved["model"].items():
        # kind: weight or bias
        path, _, kind = name.removeprefix("_orig_mod.").removeprefix("transformer.").rpartition(".")
        if path == "lm_head" or path in EMBEDDINGS:
            model[f"{EMBEDDINGS.get(path, path)}.{kind}"] = tensor
            continue
        _, layer, module = path.split(".", 2)  # such as h.0.attn.c_attn
        if module == "attn.c_attn":  # (3 d_model, d_model), its bias (3 d_model)
            for part, share in zip("qkv", tensor.chunk(3)):
                model[f"blocks.{layer}.attn.{part}.{kind}"] = share
        elif module in MODULES:  # not the causal mask, which versions without flash attention keep
            model[f"blocks.{layer}.{MODULES[module]}.{kind}"] = tensor
    tokenizer = "gpt2" if config["vocab_size"] in GPT2_VOCABULARIES else "nanoGPT's meta.pkl"
    return {
        "step": 0, "seconds": 0.0, "best_val_loss": float("inf"), "wandb_id": None, "config": config, "model": model,
        "optimizer": {}, "scaler": {}, "meta": {"tokenizer": tokenizer, "vocab_size": config["vocab_size"]},
    }  # fmt: skip
