"""The four-way user study."""
