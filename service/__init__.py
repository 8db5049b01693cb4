"""The online half: HTTP API, broker, scheduler, engine, workers. Reads checkpoints."""
