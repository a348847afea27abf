"""The beginning of a program that loads metrics of evaluate in a process without a network."""

PRELUDE = """
import json, socket, sys

def no_network(*arguments, **options):
    raise OSError("this process has no network")

socket.socket.connect = no_network
import evaluate

"""
