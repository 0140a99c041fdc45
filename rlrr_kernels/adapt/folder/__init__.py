"""Adapter folders: ``files`` has what lies in one, ``card`` its page, ``save_load`` the way from and to models."""
