"""An HTTP server in OpenAI's form over one engine or several. `app.make_app` makes it, `serve.serve` runs it.

One thread owns the engine (`serving.loop`), or a process each of several (`replicas`). The event loop reads requests
and writes answers, and a few threads encode prompts, so that a long text holds up nobody.
"""
