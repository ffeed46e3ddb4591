"""Small helpers on module trees and nested values, each once."""
