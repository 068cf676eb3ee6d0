"""Latents and text embeddings on disk: `Family.encode`, with files in between.

keys      what an entry is known by: everything that it was made of
store     the folder: shards, and the manifest that says what is in them
entries   the entries that a recipe asks for; reading them in training
fill      `reeltune cache`: making those that are not there
"""
