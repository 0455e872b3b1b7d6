"""An OpenAI-compatible server: the engine in one thread, HTTP in another."""
