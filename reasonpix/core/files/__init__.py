"""Reading files of users: texts in any Unicode encoding, folders, tars, and what is ignored."""
