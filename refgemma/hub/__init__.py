"""Models from a Hugging Face hub: `offer` asks what a hub has, `download` fetches it. Nothing is fetched unasked."""
