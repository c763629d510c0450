"""Attention that reaches the UNet: processors of ours on the `Attention`s of a diffusers network.

`kernels` computes it, and says which kernel does; `texts` are keys and values, computed once for all that read them;
`processor` stands in one layer; `network` puts processors on a network's layers and takes them off. The network itself
is never touched (diffusers' own `set_attention_backend` does not reach a UNet's processors), and nothing here knows
rows, samplers or families.
"""
