"""Messages between processes of one or many hosts: a codec, authenticated connections, large arrays.

Frames on TCP connections carry what is to be said; large arrays follow over torch.distributed.
"""
