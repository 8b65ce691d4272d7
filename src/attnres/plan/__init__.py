"""What a split of a model over processes takes: memory, traffic, time. No process is started."""
