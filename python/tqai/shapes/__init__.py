"""What a layer's keys and values look like, whatever the framework: heads, rotary embedding.

Nothing here imports one.
"""
