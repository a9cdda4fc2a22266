"""
What `mini-transformers serve` adds to the server of transformers: the name under which the model was started is the one
that clients use; a text ends before a stop string, and where the context is full; and a setting that the server would
pass over in silence works or is refused with a reason.

`server.install` puts these classes in the place of those of transformers, before its command makes them.
"""
