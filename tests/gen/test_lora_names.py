"""The names of a layer in files: as published files and libraries have them, and back."""

from __future__ import annotations

from gen.adapters.lora_names import by_name, flat, split, stability_names, text_names, unet_names


def test_names_in_stabilitys_code() -> None:
    """As published files of Stable Diffusion XL have them, of two residual blocks a level."""
    for layer, name in {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.transformer_blocks.0.norm": "input_blocks.4.1.transformer_blocks.0.norm",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
        "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.resnets.0.conv_shortcut": "output_blocks.3.0.skip_connection",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
        "add_embedding.linear_2": "label_emb.0.2",
    }.items():
        assert name in list(stability_names(layer, 2)), layer
    assert list(stability_names("conv_norm_out", 2)) == []


def test_names_of_a_unets_layer() -> None:
    assert list(unet_names("conv_norm_out", 2)) == ["conv_norm_out"]
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    theirs = "middle_block.1.transformer_blocks.0.attn1"
    assert list(unet_names(f"{layer}.to_out.0", 2)) == [
        f"{layer}.to_out.0",
        f"{layer}.processor.to_out",
        f"{theirs}.to_out.0",
    ]


def test_names_of_a_text_towers_layer_with_and_without_what_transformers_leaves_out() -> None:
    layer = "encoder.layers.0.self_attn"
    for given in (f"{layer}.q_proj", f"text_model.{layer}.q_proj"):
        assert list(text_names(given)) == [
            f"{layer}.q_proj",
            f"{layer}.to_q",
            f"text_model.{layer}.q_proj",
            f"text_model.{layer}.to_q",
        ]


def test_a_layer_is_found_by_each_of_its_names() -> None:
    """Blocks are counted by the first level of the UNet: Stability's third block follows two residual ones."""
    down = "down_blocks.0.downsamplers.0.conv"
    layers = [("unet", f"down_blocks.0.resnets.{place}.conv1") for place in range(2)]
    layers += [("unet", down), ("text_encoder", "encoder.layers.0.mlp.fc1"), ("text_encoder_2", "text_projection")]
    known = by_name(layers)
    for name, layer in {
        f"unet.{down}": ("unet", down),
        down: ("unet", down),
        f"lora_unet_{down}": ("unet", down),
        "lora_unet_input_blocks.3.0.op": ("unet", down),
        "lora_te1_text_model.encoder.layers.0.mlp.fc1": ("text_encoder", "encoder.layers.0.mlp.fc1"),
        "text_encoder.encoder.layers.0.mlp.fc1": ("text_encoder", "encoder.layers.0.mlp.fc1"),
        "lora_te2_text_projection": ("text_encoder_2", "text_projection"),
    }.items():
        assert known[flat(name)] == layer
    assert flat("text_projection") not in known  # whose tower would it be?


def test_keys_are_split_into_layer_and_factor() -> None:
    assert split("unet.conv_in.lora_A.weight") == ("unet.conv_in", "down")
    assert split("lora_unet_conv_in.lora_up.weight") == ("lora_unet_conv_in", "up")
    assert split("lora_unet_conv_in.alpha") == ("lora_unet_conv_in", "alpha")
    assert split("mid.attn1.processor.to_q_lora.down.weight") == ("mid.attn1.processor.to_q", "down")
    assert split("te.q_proj.lora_linear_layer.up.weight") == ("te.q_proj", "up")
    assert split("unet.conv_in.hada_w1_a") == ("unet.conv_in.hada_w1_a", "")
