"""An HTTP server in OpenAI's form over one engine. `app.make_app` makes it, `serve.serve` runs it until a signal.

One thread owns the engine (`serving.loop`). The event loop reads requests and writes answers, and a few threads encode
prompts, so that a long text holds up nobody.
"""
