"""Language models: prompts, requests, budgets, and the ledger of stored answers."""
