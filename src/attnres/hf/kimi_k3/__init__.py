"""Kimi K3's checkpoint layout: which tensor of theirs is which of ours (`names`), and a folder of it as a native model
(`door`, with `config` and `weights`)."""
