// Errors by name: programs switch on it, the message is for people.

/**
 * @param {string} name
 * @param {string} message
 */
export function named(name, message) {
  return Object.assign(new Error(message), { name });
}

/**
 * An error as it travels between threads.
 * @param {unknown} error
 */
export function pack(error) {
  const { name = "Error", message = String(error) } = /** @type {Error} */ (error ?? {});
  return { name, message };
}
