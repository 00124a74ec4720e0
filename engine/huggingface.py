"""GPT-2 of Hugging Face as a GPT: parametrization="standard", structure="dense". lab/convert.py exports the other direction."""

from configurator import ConfigError
from model import GPT
from options import GPTConfig

# A block's modules, by our name and by Hugging Face's; q, k and v are one module there.
GPT2_BLOCK_NAMES = {
    "attn_norm": "ln_1",
    "attn.proj": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}


def load_gpt2(name):
    """A GPT with GPT-2's weights, from the Hugging Face hub ("gpt2", "gpt2-xl") or a local folder.

    ConfigError where weights are missing or the model differs from GPT-2 in more than its sizes; errors of transformers pass through.
    """
    from transformers import GPT2LMHeadModel, PretrainedConfig

    kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    if kind != "gpt2":
        raise ConfigError(f"{name} has model_type={kind}, but this GPT-2 needs gpt2: take another model")
    # transformers invents random numbers for missing weights, and drops layers that config.json does not count.
    theirs, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    dropped = [key for key in report["unexpected_keys"] if ".h." in f".{key}"]
    for names, wrong in ((report["missing_keys"], "lacks"), (dropped, "has layers beyond its n_layer:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"{name} {wrong} {min(names)}{more}: take another copy")
    c = theirs.config
    wanted = dict(
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )
    for key, value in {**wanted, "n_inner": c.n_inner and 4 * c.n_embd}.items():
        if getattr(c, key) != value:
            raise ConfigError(f"{name} has {key}={getattr(c, key)}, but this GPT-2 needs {value}: take another model")
    model = GPT(
        GPTConfig(
            block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, d_model=c.n_embd,
            bias=True, parametrization="standard", structure="dense",
        )
    )  # fmt: skip
    model.load_state_dict(gpt2_state_dict(theirs.state_dict(), c.n_layer))
    return model


def gpt2_state_dict(theirs, n_layer):
    """Hugging Face's GPT-2 weights under our names. Their Conv1D stores (d_in, d_out), and q, k and v in one."""
    ours = {
        "token_embedding.weight": theirs["transformer.wte.weight"],
        "position_embedding.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
        "lm_head.weight": theirs["transformer.wte.weight"],
    }
    for layer in range(n_layer):
        for kind in ("weight", "bias"):
            here, there = f"blocks.{layer}", f"transformer.h.{layer}"
            for our_name, their_name in GPT2_BLOCK_NAMES.items():
                ours[f"{here}.{our_name}.{kind}"] = theirs[f"{there}.{their_name}.{kind}"].t()
            for our_name, part in zip("qkv", theirs[f"{there}.attn.c_attn.{kind}"].t().chunk(3)):
                ours[f"{here}.attn.{our_name}.{kind}"] = part
    return ours
