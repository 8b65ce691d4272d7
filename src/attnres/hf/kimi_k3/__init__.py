"""Kimi K3's checkpoint layout: which tensor of theirs is which of ours (`names`)."""
